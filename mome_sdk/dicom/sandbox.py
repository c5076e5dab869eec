"""run_limited: work on files that nobody vouches for, in a process with bounded memory and time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mome_sdk.errors import DicomError


@dataclass(frozen=True)
class Limits:
    """What files may ask for; each is checked before the memory or the disk is taken.

    Attributes:
        files: Files of a folder or an archive.
        file_bytes: Bytes of one file.
        total_bytes: Bytes of all image files together, unpacked.
        zip_ratio: Bytes that a zip file unpacks to, for each of its own. Noiseless images reach
            about 30; deflate ends at 1,032.
        edge: Rows, and columns, of an image.
        frames: Frames of one file.
        voxels: Voxels of one series; 512 Mi is a whole head at 0.25 mm.
        memory_bytes: Address space of the process that reads the files.
        seconds: Time for one task of that process.
    """

    files: int = 20_000
    file_bytes: int = 2**29
    total_bytes: int = 2**33
    zip_ratio: int = 200
    edge: int = 4096
    frames: int = 20_000
    voxels: int = 2**29
    memory_bytes: int = 2**30
    seconds: float = 300.0


def run_limited(task: str, folder: Path, limits: Limits, **request: Any) -> dict[str, Any]:
    """What a task of `parse.py` says, done in another process.

    Args:
        task: Its name in `parse.TASKS`.
        folder: An empty folder of the caller's; the process works in it.
        limits: Address space and processor time are enforced by the system, the rest by the task.
        request: Arguments of the task, as JSON values.

    Returns:
        The answer. Nothing but JSON comes back: no object of the other process, no byte of a file.

    Raises:
        DicomError: what the task found; `dicom.limit-time`, `dicom.limit-memory`, a bound was hit;
            `dicom.crashed`, the process ended by itself.

    What the other process writes on standard error is thrown away: warnings of libraries quote
    values, and values name patients.
    """
    said = json.dumps({"task": task, "limits": asdict(limits), **request})
    code = "from mome_sdk.dicom.parse import main; main()"
    # One thread: every further one of the linear algebra takes address space, and none is used.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            # Twice the processor time: waiting for a slow disk is no attack.
            answer, _ = process.communicate(said.encode(), timeout=2 * limits.seconds)
        except subprocess.TimeoutExpired as error:
            raise _out_of_time(limits) from error
        finally:
            process.kill()
    if process.returncode == -signal.SIGXCPU:
        raise _out_of_time(limits)
    if process.returncode != 0:
        raise DicomError(
            "dicom.crashed",
            f"The process that reads the files ended with status {process.returncode}.",
            hint="A file is damaged or hostile: nothing of these files was used.",
        )
    return _checked(answer)


def _checked(answer: bytes) -> dict[str, Any]:
    """The answer, or what the task found as an error."""
    value: dict[str, Any] = json.loads(answer)
    if "error" in value:
        code, message, hint = value["error"]
        raise DicomError(str(code), str(message), hint=str(hint))
    return value


def _out_of_time(limits: Limits) -> DicomError:
    return DicomError(
        "dicom.limit-time",
        f"Reading the files took more than {limits.seconds:g} s.",
        hint="Name fewer files; a file that takes so long is damaged or hostile.",
    )
