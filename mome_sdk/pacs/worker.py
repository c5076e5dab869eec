"""One job after the other: images, series, segmentation, results, everybody who gets them."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mome_sdk.dicom.classify import load_rules
from mome_sdk.errors import DicomError, EngineError, MomeError, PeerError
from mome_sdk.nifti import read_nifti
from mome_sdk.segmenter import Segmenter
from mome_sdk.study import read_study, results

from . import dicomweb, sender
from .audit import Audit
from .jobs import Job, JobQueue
from .settings import ServiceConfig

IDLE_S = 0.5
WEB = "dicomweb"
Open = Callable[[], Segmenter]


class Worker(threading.Thread):
    """Segments what is complete, delivers what is segmented; errors end a job or put it off.

    Args:
        config: Of the service.
        queue: Where the jobs are.
        audit: What became of them.
        segmenter: Opens the model; called once, in the worker's thread.
    """

    def __init__(
        self, config: ServiceConfig, queue: JobQueue, audit: Audit, segmenter: Open
    ) -> None:
        super().__init__(name="worker", daemon=True)
        self._config, self._queue, self._audit, self._open = config, queue, audit, segmenter
        self._stopping = threading.Event()
        self._segmenter: Segmenter | None = None
        self._peers = {peer.aet: peer for peer in config.peers if peer.receives}
        self._rules = load_rules(Path(config.results.rules) if config.results.rules else None)
        self._swept = 0.0
        self.ready = threading.Event()
        self.seconds = 0.0  # of the last job

    @property
    def targets(self) -> list[str]:
        """Who receives results."""
        web = self._config.dicomweb
        return [*self._peers, *([WEB] if web is not None and web.receives else [])]

    def stop(self) -> None:
        """End after the job at hand."""
        self._stopping.set()

    def run(self) -> None:
        """Work until stopped."""
        self._segmenter = self._open()
        self.ready.set()
        while not self._stopping.is_set():
            job = self._queue.lease()
            if job is None:
                self._sweep()
                self._stopping.wait(IDLE_S)
            else:
                self.work(job)

    def work(self, job: Job) -> None:
        """Take a job as far as it goes."""
        started = time.monotonic()
        try:
            if job.state == "complete":
                made, said = self._segment(job)
                said["seconds"] = round(time.monotonic() - started, 2)
                if not self._queue.segmented(job, made, said):
                    self._queue.release(job)
                    return
                self._audit.write("segmented", study=job.study, job=job.id, **_countable(said))
            self._deliver(job)
            self._queue.delivered(job)
            self._audit.write("delivered", study=job.study, job=job.id)
        except MomeError as error:
            self._failed(job, error)
        except Exception as error:  # a defect of ours must not take the node down
            self._failed(
                job, DicomError("dicom.defect", f"A mistake of ours: {type(error).__name__}.")
            )
        finally:
            self.seconds = time.monotonic() - started

    def _failed(self, job: Job, error: MomeError) -> None:
        again = isinstance(error, EngineError) or (isinstance(error, PeerError) and error.retryable)
        state = self._queue.failed(job, error, self._config.retry, again=again)
        self._audit.write("failed", study=job.study, job=job.id, code=error.code, state=state)

    def _segment(self, job: Job) -> tuple[dict[str, bytes], dict[str, Any]]:
        assert self._segmenter is not None
        files = self._queue.files(job)
        if job.source == "nifti":
            return self._segment_nifti(files[0])
        wanted = self._config.results
        with tempfile.TemporaryDirectory(prefix="mome-") as folder:
            source: Any = files
            if job.source == "zip":  # told by its name
                source = Path(folder, "study.zip")
                shutil.copyfile(files[0], source)
            chosen = read_study(source, wanted.series, rules=self._rules)
        found = self._segmenter.predict(chosen.volume)
        made = results(
            chosen,
            found,
            wanted.formats,
            segments=wanted.segments,
            empty_seg=wanted.empty_seg,
        )
        return made, {
            "modality": chosen.series.modality,
            "series": chosen.series.label,
            "reasons": list(chosen.series.reasons),
            "considered": list(chosen.considered),
            "lesions": len(found.lesions),
            "volume_ml": round(found.volume_ml, 3),
        }

    def _segment_nifti(self, path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
        assert self._segmenter is not None
        with tempfile.TemporaryDirectory(prefix="mome-") as folder:
            zipped = path.read_bytes()[:2] == b"\x1f\x8b"
            named = Path(folder, "scan.nii.gz" if zipped else "scan.nii")
            shutil.copyfile(path, named)
            found = self._segmenter.predict(read_nifti(named))
            mask = Path(folder, "mask.nii.gz")
            found.save(mask)
            data = mask.read_bytes()
        said = {"lesions": len(found.lesions), "volume_ml": round(found.volume_ml, 3)}
        return {"nifti": data}, said

    def _deliver(self, job: Job) -> None:
        """Send what has not arrived yet; an upload has nobody to be sent to."""
        if job.source != "dicom":
            return
        waiting: dict[str, dict[str, bytes]] = {}
        files = self._queue.results(job.id)
        for target, name in self._queue.undelivered(job, self.targets):
            waiting.setdefault(target, {})[name] = files[name].read_bytes()
        for target, objects in waiting.items():
            self._send(target, objects)
            for name in objects:
                self._queue.sent(job, target, name)

    def _send(self, target: str, objects: Mapping[str, bytes]) -> None:
        if target == WEB:
            assert self._config.dicomweb is not None
            dicomweb.store(objects, self._config.dicomweb)
        else:
            sender.send(objects, self._peers[target], self._config.node)

    def _sweep(self) -> None:
        if time.monotonic() - self._swept > 600:
            self._swept = time.monotonic()
            self._queue.sweep(self._config.keep_hours * 3600)


def _countable(said: Mapping[str, Any]) -> dict[str, Any]:
    """What may stand in the log: no text of a header."""
    return {name: said[name] for name in ("modality", "lesions", "seconds") if name in said}
