"""Backfill: studies that a PACS has and that never came, or not whole, are fetched."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from functools import partial

from mome_sdk.errors import MomeError, PeerError

from . import dicomweb, sender
from .audit import Audit
from .dicomweb import WEB
from .jobs import JobQueue
from .receiver import identifiers
from .settings import DicomWebConfig, Peer, ServiceConfig


class Backfill(threading.Thread):
    """Looks at the start and then every `backfill_s`; what is there already is not asked for.

    No event of a PACS is relied on: Orthanc 1.10.1 tells nobody of a study that became complete
    while it was restarted.
    """

    def __init__(self, config: ServiceConfig, queue: JobQueue, audit: Audit) -> None:
        super().__init__(name="backfill", daemon=True)
        self._config, self._queue, self._audit = config, queue, audit
        self._stopping = threading.Event()
        self._tried: dict[str, tuple[int, int]] = {}

    def stop(self) -> None:
        """End after the study at hand."""
        self._stopping.set()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopping.is_set():
            self.look()
            self._stopping.wait(self._config.node.backfill_s)

    def look(self) -> int:
        """Fetch what is missing; returns how many studies were asked for."""
        asked = 0
        for peer in self._config.peers:
            if peer.backfill_days:
                asked += self._from(peer.aet, lambda peer=peer: self._missing(peer))  # type: ignore[misc]
        server = self._config.dicomweb
        if server is not None and server.backfill_days:
            asked += self._from(WEB, lambda: self._missing_web(server))
        return asked

    def _from(self, peer: str, work: Callable[[], int]) -> int:
        try:
            return work()
        except (MomeError, OSError, sqlite3.Error) as error:
            code = error.code if isinstance(error, MomeError) else type(error).__name__
            self._audit.write("backfill-failed", peer=peer, code=code)
            return 0

    def _missing(self, peer: Peer) -> int:
        asked = 0
        for study in sender.recent_studies(peer.backfill_days, peer, self._config.node):
            count = sender.images_of_study(study, peer, self._config.node)
            if self._stopping.is_set():
                break
            if count is not None and self._is_missing(study, count, peer.aet):
                node = self._config.node
                self._fetch(study, peer.aet, partial(sender.fetch_study, study, peer, node))
                asked += 1
        return asked

    def _missing_web(self, server: DicomWebConfig) -> int:
        asked = 0
        for study in dicomweb.recent_studies(server.backfill_days, server):
            if self._stopping.is_set():
                break
            if self._is_missing(study, dicomweb.images_of_study(study, server), WEB):
                self._fetch(study, WEB, partial(self._keep, study, server))
                asked += 1
        return asked

    def _fetch(self, study: str, peer: str, work: Callable[[], object]) -> None:
        """What does not succeed is tried at the next look, and does not hold up other studies."""
        try:
            work()
        except (MomeError, OSError, sqlite3.Error) as error:
            del self._tried[study]
            if not isinstance(error, PeerError) or error.code == "peer.unreachable":
                raise  # the others would not come, either
            self._audit.write("backfill-failed", study=study, peer=peer, code=error.code)

    def _keep(self, study: str, server: DicomWebConfig) -> None:
        for data in dicomweb.fetch_study(study, server):
            try:
                _, sop = identifiers(data)
            except Exception:  # any: the parser meets bytes that nobody vouches for
                self._audit.write("refused", reason="an image without usable identifiers")
                continue
            self._queue.receive(study, sop, data, WEB)

    def _is_missing(self, study: str, count: int, peer: str) -> bool:
        """Whether to ask: not twice in one state, or what we do not take would loop for ever."""
        state = (count, self._queue.images_of(study))
        if state[1] >= count or self._tried.get(study) == state or not self._queue.has_room():
            return False
        self._tried[study] = state
        self._audit.write("backfill", study=study, peer=peer, images=count, here=state[1])
        return True
