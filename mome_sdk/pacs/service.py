"""Starts and stops the parts of the node; decides when a study is complete."""

from __future__ import annotations

import fcntl
import logging
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mome_sdk.errors import InputError
from mome_sdk.files import make_folders
from mome_sdk.segmenter import Segmenter

from . import sender
from .api import Api
from .audit import Audit
from .backfill import Backfill
from .jobs import JobQueue
from .receiver import Receiver
from .settings import Peer, ServiceConfig
from .worker import Worker

CHECK_S = 0.5
LEAST_QUIET_S = 1.0  # before a peer is asked for its count


class Service:
    """The node: receiver, worker, HTTP, and the watch over studies.

    Args:
        config: All of it; paths are relative to the working directory.
        segmenter: Opens the model; the configured one if not given.

    Raises:
        InputError: `argument.config`, another node works in the same folder.
        MomeError: The model cannot be opened.
    """

    def __init__(
        self, config: ServiceConfig, *, segmenter: Callable[[], Segmenter] | None = None
    ) -> None:
        self.config = config
        folder = Path(config.data).resolve()
        make_folders(folder)
        self._alone = _lock(folder / "lock")
        self.queue = JobQueue(folder, free_mb=config.free_mb)
        self.audit = Audit(folder / "logs")
        self.receiver = Receiver(config.node, config.peers, self.queue, self.audit)
        self.worker = Worker(
            config,
            self.queue,
            self.audit,
            segmenter=(segmenter or self._segmenter)(),
            commitments=self.receiver.commitments,
        )
        self.backfill = Backfill(config, self.queue, self.audit)
        self.api = Api(config.http, self.queue, self.worker, self.audit)
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._run_watch, name="watch", daemon=True)
        self._asked: dict[str, tuple[int, int | None]] = {}
        self._since = time.monotonic()

    def _segmenter(self) -> Segmenter:
        wanted = self.config.results
        return Segmenter(
            wanted.model,
            engine=wanted.engine,
            device=wanted.device,
            precision=wanted.precision,
            mirror=wanted.mirror,
            threads=wanted.threads or None,
            space="native",
        )

    def start(self) -> None:
        """Start everything; returns at once.

        Raises:
            OSError: An address is in use.
        """
        self.receiver.start()
        self._since = time.monotonic()
        self.api.start()
        self.audit.write("started")
        self.worker.start()
        self._watch.start()
        self.backfill.start()

    def stop(self) -> None:
        """Stop: no new images, then the job at hand, then the queue."""
        self.receiver.stop()
        self.api.stop()
        self._stopping.set()
        threads = (self.backfill, self.worker, self._watch)
        self.backfill.stop()
        self.worker.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join(timeout=60)
        self.audit.write("stopped")
        if not any(thread.is_alive() for thread in threads):
            self.queue.close()
        self._alone.close()

    def run(self) -> None:
        """Start, and stop at SIGTERM or SIGINT.

        What libraries log and warn of is thrown away: they quote headers, and headers name
        patients. The audit log says what happened.
        """
        threading.excepthook = self._defect
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        self.start()
        stop.wait()
        self.stop()

    def _defect(self, found: threading.ExceptHookArgs) -> None:
        """A thread ended: a traceback would quote values."""
        self.audit.write("defect", kind=found.exc_type.__name__)

    # ---- when a study is complete

    def _run_watch(self) -> None:
        while not self._stopping.wait(CHECK_S):
            try:
                self.look()
            except (OSError, sqlite3.Error) as error:
                self.audit.write("queue-failed", code=type(error).__name__)

    def look(self) -> None:
        """Make jobs of the studies that are complete.

        While the node was down nobody could send: that time is not quiet.
        """
        up = time.monotonic() - self._since
        for study, peer, images, since_first, last in self.queue.pending():
            since_last = min(last, up)
            if self._is_complete(study, peer, images, since_first, since_last):
                number = self.queue.complete(study, images)
                if number is not None:
                    self.audit.write("complete", study=study, job=number, images=images)

    def _is_complete(
        self, study: str, aet: str, images: int, since_first: float, since_last: float
    ) -> bool:
        """Quiet for long enough; or as many images as the sender says that there are.

        Where it says that there are more, they are waited for, up to `wait_s`.
        """
        node = self.config.node
        peer = next((p for p in self.config.peers if p.aet == aet and p.answers), None)
        if peer is None:
            return since_last >= node.quiet_s
        if since_last < min(LEAST_QUIET_S, node.quiet_s):
            return False
        expected = self._count(study, peer, images)
        if expected is None:
            return since_last >= node.quiet_s
        return images >= expected or since_first >= node.wait_s

    def _count(self, study: str, peer: Peer, images: int) -> int | None:
        """What the peer says of a study; asked once for each number of images that we have."""
        known = self._asked.get(study)
        if known is None or known[0] != images:
            self._asked = dict(list(self._asked.items())[-1000:])
            self._asked[study] = (images, sender.images_of_study(study, peer, self.config.node))
        return self._asked[study][1]


def _lock(path: Path) -> IO[bytes]:
    """The folder is ours until this is closed, or the process ends in any way."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            "argument.config",
            "Another node works in the folder that `data` names.",
            hint="Stop it, or name another folder.",
        ) from error
    return file
