"""Affine registration of a scan to the bundle's template, by programs that others keep."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import niimath
import numpy as np
from numpy.typing import NDArray

from mome_sdk.errors import PreparationError
from mome_sdk.preprocess.intensity import head_of
from mome_sdk.volume import Volume, inverse

Matrix = NDArray[np.float64]

METHOD = f"niimath {version('niimath')}"

# What of a scan, from the top of the head down, is taken for the head: necks and shoulders would
# move its centre (FSL's robustfov looks at the same 170 mm).
_HEAD_MM = 170.0
# Turned by this much about the left-right axis, heads that lie far back or forward are caught too.
_NOD_DEGREES = (0.0, 25.0, -25.0)
# Usually 4 to 15 s; images of noise can keep it for many minutes.
_TIMEOUT_S = 120


def registrations(
    scan: Volume, template: Volume, centre_mm: NDArray[np.float64], *, threads: int | None = None
) -> Iterator[Matrix]:
    """Affine registrations of a scan, one for each start; the caller judges and stops.

    Args:
        scan: The image (I, J, K), any axes; head or brain.
        template: The template brain.
        centre_mm: Middle of the template's brain, RAS mm: where the scan's head is put first.
        threads: Most threads of the program; None leaves it to the program.

    Yields:
        4x4 matrices from the scan's RAS mm to the template's RAS mm, 12 degrees of freedom. The
        first start has the head's centre on the template's, the second is the header's own place,
        then the head is nodded forward and back.

    Raises:
        PreparationError: `registration.failed`, the program ended with an error every time.
    """
    starts = [_centred(scan, centre_mm, degrees) for degrees in _NOD_DEGREES]
    starts.insert(1, np.eye(4))
    problem = ""
    found = False
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        target = Path(folder, "template.nii")
        nib.save(nib.Nifti1Image(template.array, template.affine), target)
        for start in starts:
            result = _niimath(Volume(scan.array, start @ scan.affine), target, threads)
            if isinstance(result, str):
                problem = result
                continue
            found = True
            yield inverse(result) @ start
    if not found:
        raise PreparationError(
            "registration.failed",
            f"The registration program ended with an error: {problem}",
            hint="Reinstall it (pip install --force-reinstall niimath), or register the image "
            "yourself and use space 'mni'.",
        )


def _niimath(scan: Volume, template: Path, threads: int | None) -> Matrix | str:
    """From the template's mm to the scan's mm, or what the program said instead."""
    source = template.with_name("scan.nii")
    matrix = template.with_name("matrix.json")
    matrix.unlink(missing_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(scan.array, np.float32), scan.affine), source)
    moved = str(template.with_name("moved.nii"))
    options = ["-allineate", str(template), "-linear", "-savemat", str(matrix), moved]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    try:
        done = subprocess.run(
            [niimath.bin, str(source), *options],
            capture_output=True,
            env=environment,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}."
    if done.returncode != 0 or not matrix.exists():
        return f"exit status {done.returncode}."
    fixed_to_moving = np.array(json.loads(matrix.read_text())["fixed_to_moving"], np.float64)
    if fixed_to_moving.shape != (4, 4) or not np.isfinite(fixed_to_moving).all():
        return "its matrix is not 4x4."
    return fixed_to_moving


def _centred(scan: Volume, centre_mm: NDArray[np.float64], degrees: float) -> Matrix:
    """The scan's mm to mm in which its head's centre is at `centre_mm`, nodded by `degrees`."""
    places_mm = scan.grid.to_mm(np.argwhere(head_of(scan).array)[::7])
    top = np.percentile(places_mm[:, 2], 99.9)
    head = places_mm[places_mm[:, 2] > top - _HEAD_MM]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    start = np.eye(4)
    start[1:3, 1:3] = (cosine, -sine), (sine, cosine)
    start[:3, 3] = centre_mm - start[:3, :3] @ head.mean(axis=0)
    return start
