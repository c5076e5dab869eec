"""One job after the other: images, series, segmentation, results, everybody who gets them."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mome_sdk.dicom.classify import load_rules
from mome_sdk.errors import DicomError, EngineError, MomeError, PeerError
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.segmentation import Segmentation
from mome_sdk.segmenter import Segmenter
from mome_sdk.study import Chosen, read_study, results

from . import dicomweb, sender
from .audit import Audit
from .commitment import Commitments
from .dicomweb import WEB
from .jobs import Job, JobQueue
from .settings import ServiceConfig

IDLE_S = 0.5


class Worker(threading.Thread):
    """Segments what is complete, delivers what is segmented; errors end a job or put it off.

    Args:
        config: Of the service.
        queue: Where the jobs are.
        audit: What became of them.
        segmenter: The model.
        commitments: Reports of peers; None if nobody is asked for them.
    """

    def __init__(
        self,
        config: ServiceConfig,
        queue: JobQueue,
        audit: Audit,
        *,
        segmenter: Segmenter,
        commitments: Commitments | None = None,
    ) -> None:
        super().__init__(name="worker", daemon=True)
        self._config, self._queue, self._audit = config, queue, audit
        self._segmenter, self._commitments = segmenter, commitments
        self._stopping = threading.Event()
        self._peers = {peer.aet: peer for peer in config.peers if peer.receives}
        self._rules = load_rules(Path(config.results.rules) if config.results.rules else None)
        self._swept = 0.0
        self._reading = threading.Lock()  # one look at a time
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
        """Work until stopped; a disk that is full for a while does not end it."""
        while not self._stopping.is_set():
            try:
                job = self._queue.lease()
                if job is None:
                    self._sweep()
                else:
                    self.work(job)
                    continue
            except (OSError, sqlite3.Error) as error:
                self._audit.write("queue-failed", code=type(error).__name__)
            self._stopping.wait(IDLE_S)

    def work(self, job: Job) -> None:
        """Take a job as far as it goes."""
        started = time.monotonic()
        try:
            if job.attempts >= self._config.retry.attempts:  # each of them took the process down
                raise DicomError(
                    "job.crashed",
                    f"The node was ended {job.attempts} times while it worked on this job.",
                    hint="Look for a lack of memory; it can be started again.",
                )
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

    def scan(self, job: Job) -> bytes:
        """The image that a job is about, as a compressed NIfTI file that names nobody.

        Raises:
            DicomError, GeometryError: As for `read_study`; `dicom.files-gone`.
        """
        if job.source == "nifti":
            return self._queue.files(job)[0].read_bytes()
        with self._reading, tempfile.TemporaryDirectory(prefix="mome-") as folder:
            path = Path(folder, "scan.nii.gz")
            write_nifti(self._read(job).volume, path)
            return path.read_bytes()

    def _read(self, job: Job) -> Chosen:
        """The series of a study that is segmented."""
        files = self._queue.files(job)
        with tempfile.TemporaryDirectory(prefix="mome-") as folder:
            source: Any = files
            if job.source == "zip":  # told by its name
                source = Path(folder, "study.zip")
                shutil.copyfile(files[0], source)
            return read_study(source, self._config.results.series, rules=self._rules)

    def _segment(self, job: Job) -> tuple[dict[str, bytes], dict[str, Any]]:
        if job.source == "nifti":
            return self._segment_nifti(self._queue.files(job)[0])
        wanted, chosen = self._config.results, self._read(job)
        found = self._segmenter.predict(chosen.volume)
        made = results(
            chosen,
            found,
            wanted.formats,
            segments=wanted.segments,
            empty_seg=wanted.empty_seg,
        )
        return {**made, "nifti": _mask(found)}, {
            "modality": chosen.series.modality,
            "series": chosen.series.label,
            "reasons": list(chosen.series.reasons),
            "considered": list(chosen.considered),
            "lesions": len(found.lesions),
            "volume_ml": round(found.volume_ml, 3),
        }

    def _segment_nifti(self, path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="mome-") as folder:
            zipped = path.read_bytes()[:2] == b"\x1f\x8b"
            named = Path(folder, "scan.nii.gz" if zipped else "scan.nii")
            shutil.copyfile(path, named)
            found = self._segmenter.predict(read_nifti(named))
            made = {"nifti": _mask(found)}
        return made, {"lesions": len(found.lesions), "volume_ml": round(found.volume_ml, 3)}

    def _deliver(self, job: Job) -> None:
        """Send what has not arrived yet; an upload has nobody to be sent to."""
        if job.source != "dicom":
            return
        waiting: dict[str, dict[str, bytes]] = {}
        files = self._queue.results(job.id)
        for target, name in self._queue.undelivered(job, self.targets):
            waiting.setdefault(target, {})[name] = files[name].read_bytes()
        for target, objects in waiting.items():
            self._send(target, objects)  # and again after a crash: the same objects, no others
            for name in objects:
                self._queue.sent(job, target, name)

    def _send(self, target: str, objects: Mapping[str, bytes]) -> None:
        if target == WEB:
            assert self._config.dicomweb is not None
            dicomweb.store(objects, self._config.dicomweb)
        else:
            peer, node = self._peers[target], self._config.node
            sender.send(objects, peer, node)
            if peer.commits and self._commitments is not None:
                sender.commit(objects, peer, node, self._commitments)

    def _sweep(self) -> None:
        if time.monotonic() - self._swept > 600:
            self._swept = time.monotonic()
            self._queue.sweep(self._config.keep_hours * 3600)


def _mask(found: Segmentation) -> bytes:
    """The mask as a NIfTI file: what the status page shows."""
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        path = Path(folder, "mask.nii.gz")
        found.save(path)
        return path.read_bytes()


def _countable(said: Mapping[str, Any]) -> dict[str, Any]:
    """What may stand in the log: no text of a header."""
    return {name: said[name] for name in ("modality", "lesions", "seconds") if name in said}
