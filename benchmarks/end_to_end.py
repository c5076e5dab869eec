"""A whole image, .nii.gz in, .nii.gz out, by stage."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from mome_sdk.bundle import ModelBundle
from mome_sdk.sliding_window import SlidingWindow

from .engines import Contender, baseline_of, chosen, contenders, reference_logits, start
from .measure import Row, Table, compare, interleave
from .models import EXAMPLE, example_image
from .worker import PUBLISHED

_PUBLISHED = Contender("published predictor fp32", PUBLISHED)
# Of one window: logits times weights, rounded to half precision, and divided again.
_HALF_BLEND_LIMIT = 1e-2


def run(
    bundle: ModelBundle,
    *,
    threads: int,
    rounds: int,
    mirror: str = "none",
    only: Sequence[str] | None = None,
) -> Table:
    """Seconds from the bundled example's file to the mask's file, of every engine.

    Args:
        bundle: The model.
        threads: Of each engine and of the runner.
        rounds: Measurements of each engine.
        mirror: "none", or "all" for eight mirrored copies of every window.
        only: Names of engines (and PUBLISHED), to leave out others.

    The published predictor is measured unmirrored always; its mirrored row is derived and says so.
    The parity figure is that of the centre window, mirrored in the same way: the rest of the way is
    the same code for all.
    """
    starts = SlidingWindow(bundle.patch).starts(bundle.grid.reorient(bundle.axes).shape)
    work = {
        "model": bundle.name,
        "patch": list(bundle.patch),
        "image": list(bundle.grid.shape),
        "windows": prod(map(len, starts)),
        "mirror": mirror,
        "threads": threads,
    }
    table = Table("end-to-end", work)
    with tempfile.TemporaryDirectory(prefix="mome-") as folder, ExitStack() as stack:
        np.save(Path(folder, "window.npy"), example_image(bundle, bundle.patch))
        job = {
            "bundle": str(bundle.path),
            "threads": threads,
            "mirror": mirror,
            "folder": folder,
            "image": str(EXAMPLE),
        }
        group = chosen([*contenders(), _PUBLISHED], only)
        expected = {
            m: reference_logits("scan", {**job, "mirror": m}) for m in _mirrors(group, mirror)
        }
        workers = start(stack, "scan", job, group, table)
        samples = interleave(workers, rounds)
    base = baseline_of(group, workers)
    for contender in group:
        name = contender.name
        if name not in workers:
            continue
        published = contender is _PUBLISHED
        done = "none" if published else mirror
        parity = compare(workers[name].logits, expected[done], "PyTorch fp32, one window")
        row = Row(name, contender.precision, samples[name], parity, baseline=base)
        if done != mirror:
            row = derived(row)
        table.add(row, limit=_HALF_BLEND_LIMIT if published else None)
    return table


def _mirrors(group: Sequence[Contender], mirror: str) -> set[str]:
    """The mirrorings that rows of this group need a reference for."""
    found = {mirror} if any(c is not _PUBLISHED for c in group) else set()
    return found | ({"none"} if _PUBLISHED in group else set())


def derived(row: Row) -> Row:
    """What mirroring would take: eight times the network, which is all that is mirrored."""
    samples = [{**sample, "network": 8 * sample["network"]} for sample in row.samples]
    return replace(row, name=f"{row.name}, derived: 8 x its unmirrored network", samples=samples)
