"""JobQueue: received images and jobs in SQLite, their files beside it; nothing in memory counts.

A transaction is on the disk when it returns (WAL, synchronous=FULL), and a file before the row that
names it. States of a job: "complete", its images are there; "segmented", its results are made;
"delivered"; "failed"; "superseded", more images of the study came later. Images whose study is not
complete yet are "received": they have no job.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome_sdk.errors import DicomError, MomeError
from mome_sdk.files import make_folders, write_file

from .settings import RetryConfig

SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    study TEXT NOT NULL, sop TEXT NOT NULL, sha256 TEXT NOT NULL, received REAL NOT NULL,
    PRIMARY KEY (study, sop)
);
CREATE TABLE IF NOT EXISTS studies (
    study TEXT PRIMARY KEY, peer TEXT NOT NULL, first REAL NOT NULL, last REAL NOT NULL,
    pending INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, study TEXT NOT NULL, source TEXT NOT NULL,
    images TEXT NOT NULL, files TEXT NOT NULL DEFAULT '[]', state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0,
    leased REAL NOT NULL DEFAULT 0, code TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT '', said TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL, changed REAL NOT NULL, UNIQUE (study, images)
);
CREATE TABLE IF NOT EXISTS results (
    job INTEGER NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (job, name)
);
CREATE TABLE IF NOT EXISTS deliveries (
    job INTEGER NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL, sent REAL NOT NULL,
    PRIMARY KEY (job, name, target)
);
"""
LEASE_S = 3600.0
GONE = "dicom.files-gone"
OPEN = ("complete", "segmented")
SENT = ("seg", "sr", "sc")  # the results that go to the PACS; others are for people to look at
ENDED = ("delivered", "failed", "superseded")


@dataclass(frozen=True)
class Job:
    """One study with the images that it had when it was complete, or one uploaded file.

    Attributes:
        id: Number.
        study: Study Instance UID; of an upload, its sha256.
        source: "dicom", "zip" or "nifti".
        state: See the module.
        attempts: How often it failed since it was last restarted.
        code, message: Of the last failure.
        said: What was found, for people: modality, series, volume, count, seconds.
    """

    id: int
    study: str
    source: str
    state: str
    attempts: int
    code: str
    message: str
    said: Mapping[str, Any]


class JobQueue:
    """The queue in a folder; used by the threads of one process.

    Args:
        folder: Made if need be.
        free_mb: See `has_room`.
    """

    def __init__(self, folder: Path, *, free_mb: int = 0) -> None:
        self._files, self._incoming = folder / "files", folder / "incoming"
        make_folders(self._files)
        make_folders(self._incoming)
        for number in range(256):
            (self._files / f"{number:02x}").mkdir(exist_ok=True)
        _sync_folder(self._files)
        self._free = free_mb * 2**20
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            folder / "queue.sqlite", check_same_thread=False, isolation_level=None, timeout=30
        )
        self._db.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        with self._transaction():
            for statement in SCHEMA.split(";"):
                if statement.strip():
                    self._db.execute(statement)
        self._reconcile()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _reconcile(self) -> None:
        """After a crash: nobody works on a job; files without a row were not acknowledged.

        A job that was at hand counts one attempt more: what takes the process down has an end, too.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET leased = 0, attempts = attempts + 1 WHERE leased > 0 AND "
                "state IN ('complete', 'segmented')"
            )
        for path in self._incoming.iterdir():
            path.unlink()
        named = {row[0] for row in self._rows("SELECT sha256 FROM images")}
        for row in self._rows("SELECT files FROM jobs"):
            named |= {*json.loads(row[0])}
        named |= {row[0] for row in self._rows("SELECT sha256 FROM results")}
        named |= {row[0] for row in self._rows("SELECT study FROM jobs WHERE source != 'dicom'")}
        for path in self._files.glob("*/*"):
            if path.name not in named:
                path.unlink(missing_ok=True)

    # ---- files

    def _path(self, sha256: str) -> Path:
        return self._files / sha256[:2] / sha256

    def _keep(self, data: bytes) -> str:
        """Put bytes on the disk under their own hash."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._path(sha256)
        if not path.exists():
            write_file(path, data)
            _sync_folder(path.parent)
        return sha256

    def new_file(self) -> Path:
        """A name for bytes that are still coming; `upload` takes the file, a restart removes it."""
        return self._incoming / secrets.token_hex(16)

    def has_room(self) -> bool:
        """Whether more than the low-water mark of the disk is free."""
        return shutil.disk_usage(self._files).free > self._free

    # ---- images

    def receive(self, study: str, sop: str, data: bytes, peer: str) -> bool:
        """Keep an image for good; False if the very same was there already, with its file.

        Another image of the same study and SOP Instance UID takes the place of the first; one of
        another study takes nothing away.
        """
        restored = not self._path(hashlib.sha256(data).hexdigest()).exists()
        sha256, now = self._keep(data), time.time()
        with self._transaction() as db:
            if not self._path(sha256).exists():  # swept between the two
                self._keep(data)
            same = "SELECT sha256 FROM images WHERE study = ? AND sop = ?"
            known = db.execute(same, (study, sop)).fetchone()
            if known is not None and known[0] == sha256 and not restored:
                return False
            db.execute(
                "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", (study, sop, sha256, now)
            )
            db.execute(
                "INSERT INTO studies VALUES (?, ?, ?, ?, 1) ON CONFLICT (study) DO UPDATE SET "
                "last = excluded.last, peer = excluded.peer, pending = 1",
                (study, peer, now, now),
            )
        return True

    def upload(self, path: Path, source: str) -> int:
        """A job for a file of `new_file`; the same file again is the same job.

        It is done again where its results were removed for their age.
        """
        sha256, now = _hash_on_disk(path), time.time()
        with self._transaction() as db:
            path.replace(self._path(sha256))
            _sync_folder(self._path(sha256).parent)
            db.execute(
                "INSERT OR IGNORE INTO jobs (study, source, images, state, created, changed) "
                "VALUES (?, ?, '', 'complete', ?, ?)",
                (sha256, source, now, now),
            )
            row = db.execute("SELECT id FROM jobs WHERE study = ? AND images = ''", (sha256,))
            number = int(row.fetchone()[0])
            if not all(made.is_file() for made in self.results(number).values()):
                again = "UPDATE jobs SET state = 'complete' WHERE id = ? AND state = 'delivered'"
                db.execute(again, (number,))
            return number

    def images_of(self, study: str) -> int:
        """How many images of a study were received."""
        return int(self._rows("SELECT COUNT(*) FROM images WHERE study = ?", study)[0][0])

    def pending(self) -> list[tuple[str, str, int, float, float]]:
        """Studies with new images: (study, peer, images, seconds since the first and the last)."""
        now = time.time()
        rows = self._rows(
            "SELECT s.study, s.peer, s.first, s.last, COUNT(i.sop) AS n FROM studies s "
            "JOIN images i ON i.study = s.study WHERE s.pending = 1 GROUP BY s.study"
        )
        return [(r["study"], r["peer"], r["n"], now - r["first"], now - r["last"]) for r in rows]

    def complete(self, study: str, seen: int) -> int | None:
        """Make a job of a study's images; older jobs of it that have not ended are superseded.

        Args:
            study: Study Instance UID.
            seen: Its number of images when that was decided; with another one nothing is done.

        Returns:
            The job; None if there is one of exactly these images, or more came meanwhile.
        """
        now = time.time()
        with self._transaction() as db:
            rows = db.execute(
                "SELECT sop, sha256 FROM images WHERE study = ? ORDER BY sop", (study,)
            )
            images = rows.fetchall()
            if len(images) != seen:
                return None
            text = json.dumps([list(row) for row in images])
            identity = hashlib.sha256(text.encode()).hexdigest()
            db.execute("UPDATE studies SET pending = 0, first = ? WHERE study = ?", (now, study))
            same = "SELECT id FROM jobs WHERE study = ? AND images = ?"
            known = db.execute(same, (study, identity)).fetchone()
            if known is not None:  # sent again after its files were removed
                gone = "state = 'complete', attempts = 0, due = 0, code = '', message = ''"
                again = f"UPDATE jobs SET {gone} WHERE id = ? AND state = 'failed' AND code = ?"
                changed = db.execute(again, (known["id"], GONE)).rowcount
                return int(known["id"]) if changed else None
            db.execute(
                "UPDATE jobs SET state = 'superseded', changed = ? WHERE study = ? AND state IN "
                "('complete', 'segmented', 'failed')",
                (now, study),
            )
            files = json.dumps([row["sha256"] for row in images])
            made = db.execute(
                "INSERT INTO jobs (study, source, images, files, state, created, changed) "
                "VALUES (?, 'dicom', ?, ?, 'complete', ?, ?)",
                (study, identity, files, now, now),
            )
            return made.lastrowid

    # ---- jobs

    def lease(self) -> Job | None:
        """The next job that is due, for one worker alone until it is released."""
        now = time.time()
        with self._transaction() as db:
            row = db.execute(
                "SELECT * FROM jobs WHERE state IN ('complete', 'segmented') AND due <= ? AND "
                "leased < ? ORDER BY due, id LIMIT 1",
                (now, now),
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE jobs SET leased = ? WHERE id = ?", (now + LEASE_S, row["id"]))
        return _job(row)

    def files(self, job: Job) -> list[Path]:
        """The received files of a job: those that it was made of, whatever came later.

        Raises:
            DicomError: `dicom.files-gone`, some were removed, for their age.
        """
        hashes = [job.study]
        if job.source == "dicom":
            rows = self._rows("SELECT files FROM jobs WHERE id = ?", job.id)
            hashes = json.loads(rows[0]["files"])
        paths = [self._path(sha256) for sha256 in hashes]
        if gone := sum(not path.is_file() for path in paths):
            raise DicomError(
                GONE,
                f"{gone} of {len(paths)} files of this job were removed keep_hours after its end.",
                hint="Send the whole study again.",
            )
        return paths

    def segmented(self, job: Job, results: Mapping[str, bytes], said: Mapping[str, Any]) -> bool:
        """Keep a job's results; False if it was superseded meanwhile."""
        kept = {name: self._keep(data) for name, data in results.items()}
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'segmented', said = ?, changed = ? "
                "WHERE id = ? AND state = 'complete'",
                (json.dumps(said), time.time(), job.id),
            )
            if not changed.rowcount:
                return False
            db.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?)",
                [(job.id, name, sha256) for name, sha256 in kept.items()],
            )
        return True

    def results(self, number: int) -> dict[str, Path]:
        """Files of a job's results by name."""
        rows = self._rows("SELECT name, sha256 FROM results WHERE job = ? ORDER BY name", number)
        return {row["name"]: self._path(row["sha256"]) for row in rows}

    def undelivered(self, job: Job, targets: Sequence[str]) -> list[tuple[str, str]]:
        """(target, name of a result) of all that is still to be sent."""
        rows = self._rows("SELECT target, name FROM deliveries WHERE job = ?", job.id)
        sent = {(row[0], row[1]) for row in rows}
        return [
            (target, name)
            for target in targets
            for name in self.results(job.id)
            if name in SENT and (target, name) not in sent
        ]

    def sent(self, job: Job, target: str, name: str) -> None:
        """A result has arrived."""
        with self._transaction() as db:
            values = (job.id, name, target, time.time())
            db.execute("INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, ?)", values)

    def delivered(self, job: Job) -> None:
        """All results have arrived everywhere."""
        self._change(job.id, "delivered", ("segmented",))

    def failed(self, job: Job, error: MomeError, retry: RetryConfig, *, again: bool) -> str:
        """Note a failure: try again later, or never; returns the state."""
        attempts = job.attempts + 1
        over = not again or attempts >= retry.attempts
        state = "failed" if over else job.state
        now = time.time()
        with self._transaction() as db:
            row = db.execute("SELECT state FROM jobs WHERE id = ?", (job.id,)).fetchone()
            if row["state"] not in OPEN:
                return str(row["state"])
            state = "failed" if over else str(row["state"])
            db.execute(
                "UPDATE jobs SET state = ?, attempts = ?, due = ?, leased = 0, code = ?, "
                "message = ?, changed = ? WHERE id = ?",
                (
                    state,
                    attempts,
                    now + retry.delay_s(attempts),
                    error.code,
                    f"{error.message} {error.hint}".strip(),
                    now,
                    job.id,
                ),
            )
        return state

    def release(self, job: Job) -> None:
        """Give a job back as it is."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET leased = 0 WHERE id = ?", (job.id,))

    def restart(self, number: int) -> bool:
        """Start a failed job again, from what it has; False if it has not failed."""
        state = "segmented" if self.results(number) else "complete"
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, attempts = 0, due = 0, code = '', message = '', "
                "changed = ? WHERE id = ? AND state = 'failed'",
                (state, time.time(), number),
            )
        return bool(changed.rowcount)

    def _change(self, number: int, state: str, before: Sequence[str]) -> bool:
        marks = ", ".join("?" for _ in before)
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, leased = 0, code = '', message = '', changed = ? "
                f"WHERE id = ? AND state IN ({marks})",
                (state, time.time(), number, *before),
            )
        return bool(changed.rowcount)

    def get(self, number: int) -> Job | None:
        """A job by number."""
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", number)
        return _job(rows[0]) if rows else None

    def latest(self, limit: int = 200) -> list[Job]:
        """The newest jobs."""
        return [
            _job(row) for row in self._rows("SELECT * FROM jobs ORDER BY id DESC LIMIT ?", limit)
        ]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state, and how many studies wait for more images."""
        rows = self._rows("SELECT state, COUNT(*) AS n FROM jobs GROUP BY state")
        found = dict.fromkeys((*OPEN, *ENDED), 0) | {row["state"]: row["n"] for row in rows}
        received = self._rows("SELECT COUNT(*) AS n FROM studies WHERE pending = 1")[0]["n"]
        return {"received": received, **found}

    def sweep(self, older_s: float) -> int:
        """Remove the files of jobs that ended so long ago and whose study has no other job.

        Rows stay: a repeated study is recognised.
        """
        limit, removed = time.time() - older_s, 0
        with self._lock:  # no image comes in between
            ended = self._rows(
                "SELECT DISTINCT study FROM jobs WHERE study NOT IN (SELECT study FROM jobs WHERE "
                "state NOT IN ('delivered', 'superseded') OR changed > ?) AND study NOT IN "
                "(SELECT study FROM studies WHERE pending = 1)",
                limit,
            )
            for (study,) in ended:
                rows = self._rows(
                    "SELECT sha256 FROM images WHERE study = ? UNION SELECT r.sha256 FROM "
                    "results r JOIN jobs j ON j.id = r.job WHERE j.study = ?",
                    *(study, study),
                )
                for sha256 in (*(row[0] for row in rows), study):
                    path = self._path(sha256)
                    if path.is_file():
                        path.unlink()
                        removed += 1
        return removed


def _job(row: sqlite3.Row) -> Job:
    names = ("id", "study", "source", "state", "attempts", "code", "message")
    return Job(**{name: row[name] for name in names}, said=json.loads(row["said"]))


def _hash_on_disk(path: Path) -> str:
    """sha256 of a file, whose bytes are on the disk when this returns."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
