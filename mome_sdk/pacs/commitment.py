"""Storage commitment: what a peer has promised to keep, from the receiver to who waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Commitments:
    """Reports of peers (N-EVENT-REPORT) by transaction; a report nobody waits for is dropped."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._reports: dict[str, frozenset[str] | None] = {}

    @contextmanager
    def expected(self, transaction: str) -> Iterator[None]:
        """Keep a report that comes from now on."""
        with self._lock:
            self._reports[transaction] = None
        try:
            yield
        finally:
            with self._lock:
                del self._reports[transaction]

    def report(self, transaction: str, kept: frozenset[str]) -> bool:
        """Note the SOP Instance UIDs that a peer keeps; False if nobody asked."""
        with self._lock:
            if transaction not in self._reports:
                return False
            self._reports[transaction] = kept
            self._lock.notify_all()
            return True

    def wait(self, transaction: str, seconds: float) -> frozenset[str] | None:
        """What is kept; None if no report came in time. Only within `expected`."""
        with self._lock:
            self._lock.wait_for(lambda: self._reports[transaction] is not None, seconds)
            return self._reports[transaction]
