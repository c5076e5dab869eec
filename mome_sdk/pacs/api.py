"""HTTP: upload and ask, health, metrics, and a page that shows the jobs."""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from mome_sdk.nifti import NOTICE

from .audit import Audit
from .jobs import Job, JobQueue
from .settings import HttpConfig, token_of
from .worker import Worker

STATIC = Path(__file__).parent / "static"
VIEWER = STATIC / "niivue.js"
TYPES = {"nifti": "application/gzip", "seg": "application/dicom"}


class Api:
    """The HTTP server in a thread of its own.

    Args:
        config: Where it listens and who may ask.
        queue, worker, audit: What it shows.
    """

    def __init__(self, config: HttpConfig, queue: JobQueue, worker: Worker, audit: Audit) -> None:
        self._config, self._queue, self._worker, self._audit = config, queue, worker, audit
        self._token = token_of(config.token_file) if config.token_file else None
        self.app = self._routes()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen; returns when it does."""
        options: dict[str, Any] = {"log_level": "warning", "access_log": False}
        tls = self._config.tls
        if tls is not None:
            options |= {
                "ssl_certfile": tls.certificate,
                "ssl_keyfile": tls.key,
                "ssl_ca_certs": tls.trusted,
                "ssl_cert_reqs": ssl.CERT_REQUIRED,
            }
        config = uvicorn.Config(
            self.app, host=self._config.host, port=self._config.port, lifespan="off", **options
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, args=(self._server,), daemon=True)
        self._thread.start()
        end = time.monotonic() + 15
        while not self._server.started and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        if not self._server.started:
            raise OSError(f"The HTTP server could not listen on port {self._config.port}.")

    @staticmethod
    def _serve(server: uvicorn.Server) -> None:
        asyncio.run(server.serve())

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=10)
            self._server = self._thread = None

    # ---- routes

    def _routes(self) -> FastAPI:
        app = FastAPI(title="mome", docs_url=None, redoc_url=None, openapi_url=None)
        app.middleware("http")(self._guard)
        app.post("/v1/predict", status_code=202)(self._predict)
        app.get("/v1/jobs")(lambda: [_shown(job) for job in self._queue.latest()])
        app.get("/v1/jobs/{number}")(self._job)
        app.get("/v1/jobs/{number}/results/{name}")(self._result)
        app.get("/v1/jobs/{number}/scan")(self._scan)
        app.post("/v1/jobs/{number}/restart")(self._restart)
        app.get("/healthz")(lambda: {"status": "alive"})
        app.get("/readyz")(self._ready)
        app.get("/metrics")(self._metrics)
        app.get("/")(self._page)
        app.get("/jobs/{number}")(self._view)
        app.get("/static/niivue.js")(self._script)
        return app

    async def _guard(
        self, request: Request, call: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """The token, for everything but the two health questions."""
        if self._token is not None and request.url.path not in ("/healthz", "/readyz"):
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                return Response("A token is expected.\n", 401, {"WWW-Authenticate": "Bearer"})
        answer = await call(request)
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    async def _predict(self, request: Request) -> dict[str, Any]:
        """Take a zip of a DICOM study or a NIfTI file as the body; 202 and the job."""
        if not self._queue.has_room():
            raise HTTPException(503, "The disk is nearly full.", {"Retry-After": "300"})
        limit, parts, size = self._config.body_mb * 2**20, [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise HTTPException(413, f"At most {self._config.body_mb} MB are expected.")
            parts.append(part)
        data = b"".join(parts)
        source = _kind(data)
        if source is None:
            raise HTTPException(415, "A zip of DICOM files or a NIfTI file is expected.")
        number = await asyncio.to_thread(self._queue.upload, data, source)
        self._audit.write("uploaded", job=number, kind=source, bytes=size)
        return {"job": number, "url": f"/v1/jobs/{number}"}

    def _found(self, number: int) -> Job:
        job = self._queue.get(number)
        if job is None:
            raise HTTPException(404, "There is no such job.")
        return job

    def _job(self, number: int) -> dict[str, Any]:
        job = self._found(number)
        names = list(self._queue.results(number))
        return {**_shown(job), "results": [f"/v1/jobs/{number}/results/{n}" for n in names]}

    def _result(self, number: int, name: str) -> Response:
        self._found(number)
        path = self._queue.results(number).get(name)
        if path is None or not path.is_file():
            raise HTTPException(404, "There is no such result.")
        return Response(path.read_bytes(), media_type=TYPES.get(name, "application/dicom"))

    def _scan(self, number: int) -> Response:
        job = self._found(number)
        if job.source != "nifti":
            raise HTTPException(404, "Only uploaded NIfTI scans are shown here.")
        return Response(self._queue.files(job)[0].read_bytes(), media_type=TYPES["nifti"])

    def _restart(self, number: int) -> dict[str, Any]:
        job = self._found(number)
        if not self._queue.restart(number):
            raise HTTPException(409, f"The job is {job.state}: only a failed one is restarted.")
        self._audit.write("restarted", study=job.study, job=number)
        return _shown(self._found(number))

    def _ready(self) -> dict[str, str]:
        if not self._worker.ready.is_set() or not self._worker.is_alive():
            raise HTTPException(503, "The model is not loaded.")
        if not self._queue.has_room():
            raise HTTPException(503, "The disk is nearly full.")
        return {"status": "ready"}

    def _metrics(self) -> Response:
        registry = CollectorRegistry()
        jobs = Gauge("mome_jobs", "Jobs by state", ["state"], registry=registry)
        for state, count in self._queue.counts().items():
            jobs.labels(state).set(count)
        seconds = Gauge("mome_last_job_seconds", "Time of the last job", registry=registry)
        seconds.set(self._worker.seconds)
        room = Gauge("mome_disk_has_room", "1 while images are accepted", registry=registry)
        room.set(self._queue.has_room())
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def _page(self) -> Response:
        rows = "".join(
            f"<tr><td><a href='/jobs/{job.id}'>{job.id}</a></td><td>{html.escape(job.source)}</td>"
            f"<td>{html.escape(job.state)}</td><td>{html.escape(str(job.said.get('modality', '')))}"
            f"</td><td>{html.escape(job.message)}</td></tr>"
            for job in self._queue.latest()
        )
        head = "<tr><th>job</th><th>from</th><th>state</th><th>modality</th><th>message</th></tr>"
        return _html("Jobs", f"<table>{head}{rows}</table>")

    def _view(self, number: int) -> Response:
        job = self._found(number)
        said = html.escape(json.dumps(_shown(job), indent=1))
        body = f"<p><a href='/'>All jobs</a></p><pre>{said}</pre>"
        if job.source == "nifti" and self._queue.results(number):
            body += (
                _viewer(number)
                if VIEWER.exists()
                else ("<p>There is no viewer: put niivue.js of npm into pacs/static.</p>")
            )
        return _html(job.label, body)

    def _script(self) -> Response:
        if not VIEWER.exists():
            raise HTTPException(404, "The viewer is not installed.")
        return Response(VIEWER.read_bytes(), media_type="text/javascript")


def _kind(data: bytes) -> str | None:
    """ "zip" or "nifti", by the first bytes."""
    if data[:4] == b"PK\x03\x04":
        return "zip"
    return "nifti" if data[:2] == b"\x1f\x8b" or data[344:347] in (b"n+1", b"ni1") else None


def _shown(job: Job) -> dict[str, Any]:
    """A job without identifiers."""
    return {
        "job": job.id,
        "source": job.source,
        "state": job.state,
        "attempts": job.attempts,
        "code": job.code,
        "message": job.message,
        "found": dict(job.said),
        "notice": NOTICE,
    }


def _html(title: str, body: str) -> Response:
    page = (
        "<!doctype html><meta charset='utf-8'><title>mome</title><style>body{font:15px sans-serif;"
        "margin:2em}td,th{padding:.2em 1em;text-align:left}canvas{width:100%;height:60vh}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(NOTICE)}</p>{body}"
    )
    policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'self' 'unsafe-inline'"
    headers = {"Content-Security-Policy": f"{policy}; img-src 'self' data: blob:"}
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _viewer(number: int) -> str:
    return f"""<canvas id='view'></canvas><script type='module'>
import {{ Niivue }} from '/static/niivue.js';
const viewer = new Niivue({{ isResizeCanvas: true }});
await viewer.attachTo('view');
await viewer.loadVolumes([
  {{ url: '/v1/jobs/{number}/scan', name: 'scan.nii.gz' }},
  {{ url: '/v1/jobs/{number}/results/nifti', name: 'mask.nii.gz', colormap: 'red', opacity: 0.6 }},
]);
</script>"""
