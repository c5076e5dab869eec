"""Who sent what and what became of it: JSON lines without patient data."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mome_sdk.files import make_folders, write_file


class Audit:
    """`audit.jsonl` in a folder.

    Identifiers are written as salted hashes: the same study has the same one here, and nobody
    without the salt, which lies beside the log, can test a guess.
    """

    def __init__(self, folder: Path) -> None:
        make_folders(folder)
        self._path, self._lock = folder / "audit.jsonl", threading.Lock()
        salt = folder / "salt"
        if not salt.exists():
            write_file(salt, secrets.token_bytes(32))
            salt.chmod(0o600)
        self._salt = salt.read_bytes()

    def hashed(self, identifier: str) -> str:
        """12 hexadecimal digits of an identifier."""
        return hashlib.sha256(self._salt + identifier.encode()).hexdigest()[:12]

    def write(self, event: str, *, study: str | None = None, **said: Any) -> None:
        """Add a line; `said` must hold no patient data.

        A full disk stops the receiver before it stops this; a line that cannot be written is no
        reason to lose an image.
        """
        line: dict[str, Any] = {"time": round(time.time(), 3), "event": event, **said}
        if study is not None:
            line["study"] = self.hashed(study)
        text = json.dumps(line, sort_keys=True) + "\n"
        with suppress(OSError), self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(text)
