"""Everything but the network: a scan is read, registered, prepared; its result goes back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import MomeError
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.preprocess.align import Alignment, align
from mome_sdk.preprocess.pipeline import Prepared, prepare, restore
from mome_sdk.volume import Volume, inverse

from .measure import Missing, Parity, Row, Sample, Table, compare, interleave, say
from .models import EXAMPLE

# The brain's surface is interpolated twice, from slices of up to 7 mm.
_SURFACE_LIMIT = 0.3


def run(bundle: ModelBundle, scans: Sequence[Path], *, threads: int, rounds: int) -> Table:
    """Seconds of every step around the network, one row for each scan in its native space.

    Args:
        bundle: Whose template and grid are meant.
        scans: NIfTI files; none for the bundled example.
        threads: Of the registration.
        rounds: Measurements of each scan.

    The parity figure is that of the template's brain, carried from the scan's grid to the model's
    and back, against itself on the scan's grid.
    """
    names = {f"{path.parent.name}/{path.name}": path for path in scans or [EXAMPLE]}
    table = Table("preprocess", {"model": bundle.name, "threads": threads, "scans": len(names)})
    subjects, found = {}, {}
    for name, path in names.items():
        say(f"warming up {name}")
        try:
            found[name] = _parity(bundle, path, threads)
        except MomeError as error:
            table.missing.append(Missing(name, error.message))
        else:
            subjects[name] = partial(_sample, bundle, path, threads)
    samples = interleave(subjects, rounds)
    for name in subjects:
        parity, alignment = found[name]
        details = {"registration": alignment.method, **alignment.quality.as_json()}
        table.add(Row(name, "fp32", samples[name], parity, details=details), limit=_SURFACE_LIMIT)
    return table


def _sample(bundle: ModelBundle, path: Path, threads: int) -> Sample:
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    sample: Sample = {}
    scan = read_nifti(path)
    sample["read"] = lap()
    alignment = align(scan, bundle, threads=threads)
    sample["register"] = lap()
    prepared = prepare(scan, bundle, "native", alignment=alignment)
    sample["prepare"] = lap()
    mask, _ = restore(_brain(prepared), prepared)
    sample["restore"] = lap()
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        write_nifti(Volume(mask, scan.affine), Path(folder, "mask.nii.gz"))
        sample["write"] = lap()
    return sample


def _parity(bundle: ModelBundle, path: Path, threads: int) -> tuple[Parity, Alignment]:
    scan = read_nifti(path)
    alignment = align(scan, bundle, threads=threads)
    prepared = prepare(scan, bundle, "native", alignment=alignment)
    mask = bundle.brain_mask
    there = Volume(mask.array.astype(np.float32), inverse(alignment.to_template) @ mask.affine)
    expected = there.resample(scan.grid, mode="linear").array
    carried = Volume(expected, scan.affine).resample(prepared.volume.grid, mode="linear").array
    _, back = restore(np.stack((1 - carried, carried)), prepared)
    found = np.stack((1 - back, back))
    wanted = np.stack((1 - expected, expected))
    return compare(found, wanted, "the template's brain on the scan's grid"), alignment


def _brain(prepared: Prepared) -> NDArray[np.float32]:
    """Class probabilities that are certain where the brain is: something to bring back."""
    brain = prepared.brain.astype(np.float32)
    return np.stack((1 - brain, brain))
