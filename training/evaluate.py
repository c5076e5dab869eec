"""The held-out synthetic cases, and real scans with expert masks, through a bundle.

Every case gets three results: the fused output, the output of its own modality's expert alone, and
the best single intensity threshold as a baseline. Windows, weights and normalisation are those of
prediction.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import Engine, open_engine
from mome_sdk.network import MoME, UNet
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.preprocess.align import align
from mome_sdk.preprocess.pipeline import prepare
from mome_sdk.sliding_window import SlidingWindow
from mome_sdk.volume import Volume

from .anatomy import Anatomy, Byte, Float
from .config import TrainConfig
from .metrics import dice
from .synth import synthesise
from .window import CallableEngine

THRESHOLDS = np.arange(-1.0, 4.01, 0.1)


class Case(NamedTuple):
    """An image to evaluate.

    image: z-scored (D, H, W); lesion: 0 or 1; kind: of the lesion, or "real"; affine: array index
    to RAS mm.
    """

    name: str
    modality: str
    kind: str
    image: Float
    lesion: Byte
    affine: NDArray[np.float64]


class Row(NamedTuple):
    """Dice of one case; baseline: at every threshold of THRESHOLDS, above and below."""

    name: str
    modality: str
    kind: str
    volume_ml: float
    fused: float
    own_expert: float
    baseline: list[float]


def held_out_case(
    config: TrainConfig, anatomies: Sequence[Anatomy], modality: str, number: int
) -> Case:
    """Case `number` of a modality: a whole head, a function of `config.evaluation.seed` alone."""
    _, synthesis, evaluation = config.painted
    index = config.modalities.index(modality)
    rng = np.random.default_rng([evaluation.seed, index, number])
    anatomy = anatomies[number % len(anatomies)]
    grid: Any = anatomy.tissue.shape
    sample = synthesise(anatomy, (0, 0, 0), grid, modality, synthesis, rng, lesion_free=0.0)
    name = f"{modality}-{number:02d}"
    return Case(name, modality, sample.kind, sample.image, sample.lesion, anatomy.affine)


def write_case(case: Case, folder: Path) -> None:
    """Write image (no longer a z-score: 0 to 255, as small as a scan) and mask, axes R, A, S."""
    low, high = float(case.image.min()), float(case.image.max())
    image = np.round((case.image - low) * (255 / (high - low))).astype(np.uint8)
    write_nifti(Volume(image, case.affine).reorient("RAS"), folder / f"{case.name}.nii.gz")
    mask = Volume(case.lesion, case.affine).reorient("RAS")
    write_nifti(mask, folder / f"{case.name}_lesion.nii.gz")


def evaluate_case(
    case: Case, bundle: ModelBundle, fused: Engine, own: Engine, threads: int | None = None
) -> Row:
    """Dice of a case: fused, own expert, and every threshold above and below."""
    window = SlidingWindow(bundle.patch, blend=bundle.blend, threads=threads)
    found = [_core.argmax(window.run(engine, case.image[np.newaxis])) for engine in (fused, own)]
    head = case.image > case.image.min() + 0.1
    above = [dice(head & (case.image > t), case.lesion) for t in THRESHOLDS]
    below = [dice(head & (case.image < t), case.lesion) for t in THRESHOLDS]
    volume_ml = float(case.lesion.sum()) / 1000
    return Row(
        case.name,
        case.modality,
        case.kind,
        volume_ml,
        dice(found[0], case.lesion),
        dice(found[1], case.lesion),
        above + below,
    )


def real_cases(folder: Path, bundle: ModelBundle) -> Iterator[Case]:
    """The FLAIR scans of MS 19, MS 26 and a glioma, with the masks that came with them.

    Scans are registered to the template and prepared as `mome predict` does it, and their masks
    are carried to the model grid with them.
    """
    for name, mask in (
        ("ms_patient19", "lesion"),
        ("ms_patient26", "lesion"),
        ("glioma_TCGA-DU-7294", "tumour_auto_consensus"),
    ):
        scan, known = (read_nifti(folder / name / f"{file}.nii.gz") for file in ("FLAIR", mask))
        prepared = prepare(scan, bundle, "native", alignment=align(scan, bundle))
        inside = Volume((known.array > 0).astype(np.float32), known.affine)
        lesion = inside.resample(prepared.volume.grid, mode="linear").array >= 0.5
        image = np.ascontiguousarray(prepared.volume.array)
        yield Case(name, "FLAIR", "real", image, lesion.astype(np.uint8), prepared.volume.affine)


def evaluate(
    bundle: ModelBundle, cases: Iterable[Case], results: Path, *, threads: int | None = None
) -> list[Row]:
    """Evaluate cases one by one into a CSV file; a case that stands in it is not run again."""
    network = MoME(bundle.architecture).eval()
    network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in bundle.tensors.items()})
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    fused = open_engine(bundle, threads=threads)
    rows = read_rows(results) if results.exists() else []
    done = {row.name for row in rows}
    for case in cases:
        if case.name in done:
            continue
        expert = network.experts[bundle.modalities.index(case.modality)]
        assert isinstance(expert, UNet)
        own = CallableEngine(lambda x, expert=expert: expert(x, 1)[0][0])  # type: ignore[misc]
        row = evaluate_case(case, bundle, fused, own, threads)
        rows.append(row)
        with results.open("a", newline="") as file:
            csv.writer(file).writerow([*row[:3], *(f"{v:.4f}" for v in (*row[3:6], *row.baseline))])
    return rows


def read_rows(results: Path) -> list[Row]:
    """The rows of an earlier `evaluate`."""

    def row(name: str, modality: str, kind: str, *numbers: str) -> Row:
        volume_ml, fused, own_expert, *baseline = map(float, numbers)
        return Row(name, modality, kind, volume_ml, fused, own_expert, baseline)

    with results.open(newline="") as file:
        return [row(*line) for line in csv.reader(file)]


def table(rows: Sequence[Row]) -> str:
    """Mean Dice by group (modality, or "real"): cases, fused, own expert, best threshold.

    The baseline's threshold is the one that is best on these very cases, so it is flattered.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups["real FLAIR" if row.kind == "real" else row.modality].append(row)
    lines = [
        "| cases | n | lesion mL, median | fused | own expert | best threshold |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        baseline = np.array([row.baseline for row in group]).mean(axis=0).max()
        lines.append(
            f"| {name} | {len(group)} | {np.median([r.volume_ml for r in group]):.1f} "
            f"| {np.mean([r.fused for r in group]):.3f} "
            f"| {np.mean([r.own_expert for r in group]):.3f} | {baseline:.3f} |"
        )
    return "\n".join(lines)
