"""HTTP: upload and ask, health, metrics, and a page that shows the jobs."""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from mome_sdk.errors import MomeError
from mome_sdk.nifti import NOTICE

from .audit import Audit
from .jobs import Job, JobQueue
from .settings import HttpConfig, token_of
from .worker import Worker

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("niivue.js", "view.js")
TYPES = {"nifti": "application/gzip"}
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
CONNECTIONS = 64
NO_VIEWER = "<p>The viewer is not installed: `make viewer` fetches it.</p>"


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
        options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        tls = self._config.tls
        if tls is not None:
            options |= {
                "ssl_certfile": tls.certificate,
                "ssl_keyfile": tls.key,
                "ssl_ca_certs": tls.trusted,
                "ssl_cert_reqs": ssl.CERT_REQUIRED,
            }
        config = uvicorn.Config(
            self.app,
            host=self._config.host,
            port=self._config.port,
            lifespan="off",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
            **options,
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
        with suppress(SystemExit):  # the address is in use: `start` says so
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
        app.get("/static/{name}")(self._script)
        return app

    async def _guard(
        self, request: Request, call: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """The token, for everything but the two health questions; where there is none, our name.

        A page of anywhere that a browser of this machine shows could otherwise ask us, under its
        own name (DNS rebinding) or by a form.
        """
        if request.url.path not in ("/healthz", "/readyz"):
            refusal = self._refusal(request)
            if refusal is not None:
                return refusal
        answer = await call(request)
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Response("A request of another site is refused.\n", 403)
        if self._token is not None:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                return Response("A token is expected.\n", 401, {"WWW-Authenticate": "Bearer"})
        elif self._config.tls is None and re.sub(r":\d+$", "", host) not in OWN_NAMES:
            return Response("A name of this machine is expected as the host.\n", 421)
        return None

    async def _predict(self, request: Request) -> dict[str, Any]:
        """Take a zip of a DICOM study or a NIfTI file as the body; 202 and the job."""
        path = self._queue.new_file()
        try:
            source, size = await self._receive(request, path)
            number = await asyncio.to_thread(self._queue.upload, path, source)
        finally:
            path.unlink(missing_ok=True)
        self._audit.write("uploaded", job=number, kind=source, bytes=size)
        return {"job": number, "url": f"/v1/jobs/{number}"}

    async def _receive(self, request: Request, path: Path) -> tuple[str, int]:
        """Write a body to a file as it comes: what it is, and its bytes."""
        limit, size, start = self._config.body_mb * 2**20, 0, b""
        with path.open("xb") as file:
            async for part in request.stream():
                if not size or size >> 24 != (size + len(part)) >> 24:
                    self._require_room()
                size += len(part)
                if size > limit:
                    raise HTTPException(413, f"At most {self._config.body_mb} MB are expected.")
                start = start if len(start) >= 348 else (start + part)[:348]
                file.write(part)
        source = _kind(start)
        if source is None:
            raise HTTPException(415, "A zip of DICOM files or a NIfTI file is expected.")
        return source, size

    def _require_room(self) -> None:
        if not self._queue.has_room():
            raise HTTPException(503, "The disk is nearly full.", {"Retry-After": "300"})

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
        """What was segmented, as a NIfTI file; read again from what was received."""
        job = self._found(number)
        try:
            return Response(self._worker.scan(job), media_type=TYPES["nifti"])
        except MomeError as error:
            raise HTTPException(404, f"There is no scan: {error.message}") from error

    def _restart(self, number: int) -> dict[str, Any]:
        job = self._found(number)
        if not self._queue.restart(number):
            raise HTTPException(409, f"The job is {job.state}: only a failed one is restarted.")
        self._audit.write("restarted", study=job.study, job=number)
        return _shown(self._found(number))

    def _ready(self) -> dict[str, str]:
        if not self._worker.is_alive():
            raise HTTPException(503, "Nothing is segmented: the worker has not started, or ended.")
        self._require_room()
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
        body = "<p><a href='/'>All jobs</a></p>"
        if "nifti" in self._queue.results(number):
            body += _viewer(number) if (STATIC / "niivue.js").exists() else NO_VIEWER
        return _html(f"Job {number}", f"{body}<pre>{said}</pre>")

    def _script(self, name: str) -> Response:
        path = STATIC / name
        if name not in SCRIPTS or not path.exists():
            raise HTTPException(404, "There is no such script.")
        return Response(path.read_bytes(), media_type="text/javascript")


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
        "margin:2em}td,th{padding:.2em 1em;text-align:left}#frame{position:relative;height:60vh}"
        "</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(NOTICE)}</p>{body}"
    )
    policy = "default-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:"
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _viewer(number: int) -> str:
    return (
        f"<p id='state'>loading</p><div id='frame'><canvas id='view' "
        f"data-scan='/v1/jobs/{number}/scan' data-mask='/v1/jobs/{number}/results/nifti'></canvas>"
        "</div><script type='module' src='/static/view.js'></script>"
    )
