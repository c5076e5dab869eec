"""Held-out synthetic cases, lesion-free ones, and real scans with masks, through a bundle.

This is how the demonstration model is judged. Every case gets three results: the fused output, the
output of its own modality's expert alone, and the best single intensity threshold as a baseline.
Windows, weights and normalisation are those of prediction.
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
REAL, LESION_FREE = "real", "lesion-free"  # kinds of cases beside the kinds of lesions
# Folder, scan and mask of every real scan; none was trained on.
REAL_SCANS = (
    *(("ms_patient19", name, "lesion") for name in ("FLAIR", "T2", "T1")),
    *(("ms_patient26", name, "lesion") for name in ("FLAIR", "T2", "T1", "T1ce")),
    *(("glioma_TCGA-DU-7294", n, "tumour_auto_consensus") for n in ("FLAIR", "T2", "T1", "T1ce")),
    ("stroke_case0009", "dwi", "msk"),
)


class Case(NamedTuple):
    """An image to evaluate.

    image: z-scored (D, H, W); lesion: 0 or 1; kind: of the lesion, or REAL, or LESION_FREE; affine:
    array index to RAS mm.
    """

    name: str
    modality: str
    kind: str
    image: Float
    lesion: Byte
    affine: NDArray[np.float64]


class Row(NamedTuple):
    """Dice of one case; baseline: at every threshold of THRESHOLDS, above and below.

    found_ml: Volume of the fused mask.
    """

    name: str
    modality: str
    kind: str
    volume_ml: float
    found_ml: float
    fused: float
    own_expert: float
    baseline: list[float]


def held_out_case(
    config: TrainConfig, anatomies: Sequence[Anatomy], modality: str, number: int
) -> Case:
    """Case `number` of a modality: a whole head, a function of `config.evaluation.seed` alone."""
    return _head(config, anatomies, modality, number, free=False)


def lesion_free_case(
    config: TrainConfig, anatomies: Sequence[Anatomy], modality: str, number: int
) -> Case:
    """A whole head without a lesion, another one than the held-out case of that number."""
    return _head(config, anatomies, modality, number, free=True)


def _head(
    config: TrainConfig, anatomies: Sequence[Anatomy], modality: str, number: int, *, free: bool
) -> Case:
    _, synthesis, evaluation = config.painted
    index = config.modalities.index(modality)
    stream = [evaluation.seed, index, number, *([1] if free else [])]
    anatomy = anatomies[number % len(anatomies)]
    grid: Any = anatomy.tissue.shape
    sample = synthesise(
        anatomy,
        (0, 0, 0),
        grid,
        modality,
        synthesis,
        np.random.default_rng(stream),
        lesion_free=float(free),
    )
    kind = LESION_FREE if free else sample.kind
    name = f"{modality}-{'free-' if free else ''}{number:02d}"
    return Case(name, modality, kind, sample.image, sample.lesion, anatomy.affine)


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
        float(found[0].sum()) / 1000,
        dice(found[0], case.lesion),
        dice(found[1], case.lesion),
        above + below,
    )


def real_cases(
    folder: Path, bundle: ModelBundle, modalities: Sequence[str] | None = None
) -> Iterator[Case]:
    """The real scans that came with masks, of these modalities.

    Scans are registered to the template and prepared as `mome predict` does it, and their masks
    are carried to the model grid with them. The contours of the glioma are an algorithms'
    consensus, the others experts'.
    """
    for name, file, mask in REAL_SCANS:
        modality = "DWI" if file == "dwi" else file
        if modalities is not None and modality not in modalities:
            continue
        scan, known = (read_nifti(folder / name / f"{part}.nii.gz") for part in (file, mask))
        prepared = prepare(scan, bundle, "native", alignment=align(scan, bundle))
        inside = Volume((known.array > 0).astype(np.float32), known.affine)
        lesion = inside.resample(prepared.volume.grid, mode="linear").array >= 0.5
        image = np.ascontiguousarray(prepared.volume.array)
        affine = prepared.volume.affine
        yield Case(f"{name} {modality}", modality, REAL, image, lesion.astype(np.uint8), affine)


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
            csv.writer(file).writerow([*row[:3], *(f"{v:.4f}" for v in (*row[3:7], *row.baseline))])
    return rows


def read_rows(results: Path) -> list[Row]:
    """The rows of an earlier `evaluate`."""

    def row(name: str, modality: str, kind: str, *numbers: str) -> Row:
        volume_ml, found_ml, fused, own_expert, *baseline = map(float, numbers)
        return Row(name, modality, kind, volume_ml, found_ml, fused, own_expert, baseline)

    with results.open(newline="") as file:
        return [row(*line) for line in csv.reader(file)]


def table(rows: Sequence[Row]) -> str:
    """Mean Dice by group (modality, real or lesion-free): fused, own expert, best threshold.

    The baseline's threshold is the one that is best on these very cases, so it is flattered. On
    lesion-free heads only what is found counts.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        special = f"{row.kind} " if row.kind in (REAL, LESION_FREE) else ""
        groups[f"{special}{row.modality}"].append(row)
    lines = [
        "| cases | n | lesion mL, median | found mL, median | fused | own expert "
        "| best threshold |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        medians = [float(np.median([getattr(r, k) for r in group])) for k in VOLUMES]
        means = ["", "", ""]
        if group[0].kind != LESION_FREE:
            baseline = np.array([row.baseline for row in group]).mean(axis=0).max()
            dice_means = [np.mean([r.fused for r in group]), np.mean([r.own_expert for r in group])]
            means = [f"{value:.3f}" for value in (*dice_means, baseline)]
        volumes = " | ".join(f"{value:.1f}" for value in medians)
        lines.append(f"| {name} | {len(group)} | {volumes} | {' | '.join(means)} |")
    return "\n".join(lines)


VOLUMES = ("volume_ml", "found_ml")


def card(bundle: ModelBundle, rows: Sequence[Row]) -> str:
    """A model card in Markdown: what the weights are, what they were judged on, how they did."""
    training = bundle.description["training"]
    real = [row for row in rows if row.kind == REAL]
    lines = [
        f"# {bundle.name}",
        "",
        f"{bundle.notice}",
        "",
        "Generated by `mome evaluate`; every figure is of this very bundle "
        f"(sha256 {bundle.sha256[:16]}).",
        "",
        "## What it is",
        f"- {sum(t.size for t in bundle.tensors.values()):,} weights, five experts "
        f"({', '.join(bundle.modalities)}) and a gate; features {bundle.architecture.features}, "
        f"window {bundle.patch}, licence {bundle.licence}.",
        f"- Trained on {training.get('source', 'unknown data')}, seed {training.get('seed', '?')}. "
        "No real lesion was trained on.",
        "- Input: one MR image, registered and skull-stripped, z-scored over the whole volume.",
        "",
        "## How it was judged",
        f"Windows of {bundle.patch[0]} voxels with half overlap, no mirroring, no clean-up. "
        "Synthetic heads come from anatomies that were never trained on, with lesions of 0.3 to "
        "30 mL; of real scans there are few, and the contrast ranges of the training were "
        "measured on them: this says little of other patients.",
        "",
        table(rows),
        "",
        "Real scans, Dice of the fused output and of the own expert:",
        "",
        "| scan | lesion mL | found mL | fused | own expert |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.volume_ml:.1f} | {r.found_ml:.1f} | {r.fused:.3f} | {r.own_expert:.3f} |"
        for r in real
    ]
    lines += [
        "",
        "## Limits",
        "It shows that everything works; it is no measure of MoME. Small lesions, and T1 and T1ce "
        "lesions that are as bright as grey matter, are missed or confused with cortex. It has "
        "seen no artefact but the painted ones. Not for patients.",
    ]
    return "\n".join(lines) + "\n"
