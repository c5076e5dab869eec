"""The paper's figures from what an evaluation leaves: radar (2a), t-SNE (2b), degeneration (S1).

Each is written as SVG and PNG, with its numbers as CSV, and is left out where its data are missing.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler

from mome_sdk.bundle import MODALITIES
from mome_sdk.files import make_folders, write_file

from .results import Result, read_rows, slug

NOTICE = "Synthetic benchmark. Research use only, not a medical device."
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
STYLE: Any = {"svg.hashsalt": "mome", "svg.fonttype": "none", "font.size": 9}
PCA_PARTS, PERPLEXITY, TSNE_SEED = 50, 30, 0


def radar(folder: Path) -> None:
    """Figure 2a: Dice at three levels, by modality (mean of its tasks) and by lesion type."""
    rows = [r for r in read_rows(folder / "results.csv", Result) if r.group == "seen"]
    names = [n for n in dict.fromkeys(r.system for r in rows) if "without" not in n]
    axes, values = _radar_values(rows, names)
    _write_csv(
        folder, "figure-2a", ["system", *axes], [[n, *map(_cell, v)] for n, v in values.items()]
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.4))
        plot = figure.add_subplot(projection="polar")
        angles = np.linspace(0, 2 * np.pi, len(axes), endpoint=False)
        for (name, dice), colour in zip(values.items(), COLOURS, strict=False):
            closed = [*dice, dice[0]]
            plot.plot([*angles, angles[0]], closed, color=colour, label=name, linewidth=1.4)
        plot.set_xticks(angles, axes)
        plot.set_ylim(0, 1)
        figure.legend(loc="lower left", fontsize=8)
        _write(folder, "figure-2a", figure, "Dice on the seen data sets")


def _radar_values(
    rows: Sequence[Result], names: Sequence[str]
) -> tuple[list[str], dict[str, list[float]]]:
    kinds = list(dict.fromkeys(row.lesion_type for row in rows))
    there = {row.modality for row in rows}
    modalities = [name for name in MODALITIES if name in there]
    values = {}
    for name in names:
        own = [row for row in rows if row.system == name]
        tasks = _means(own, lambda row: row.task)
        sets = _means(own, lambda row: row.dataset)
        by_modality = [
            _mean([v for t, v in tasks.items() if t.endswith(f" {m}")]) for m in modalities
        ]
        by_kind = _means(own, lambda row: row.lesion_type)
        levels = [
            np.mean([r.dice for r in own]),
            np.mean([*tasks.values()]),
            np.mean([*sets.values()]),
        ]
        values[name] = [
            *map(float, levels),
            *by_modality,
            *(by_kind.get(kind, np.nan) for kind in kinds),
        ]
    return ["image level", "task level", "dataset level", *modalities, *kinds], values


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing: a system whose evaluation is not finished."""
    return float(np.mean(values)) if len(values) else float("nan")


def _means(rows: Sequence[Result], key: Callable[[Result], str]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row.dice)
    return {name: float(np.mean(values)) for name, values in groups.items()}


def embedding(folder: Path) -> None:
    """Figure 2b: t-SNE of the bottleneck, coloured by modality and by lesion type.

    Vectors are standardised, reduced to 50 principal parts, then embedded (perplexity 30 or a third
    of the images). The silhouettes are of the vectors, not of their embedding.
    """
    files = sorted((folder / "features").glob("*.npz"))
    if not files:
        return
    lines = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2 * len(files)))
        plots = figure.subplots(len(files), 2, squeeze=False)
        for path, pair in zip(files, plots, strict=True):
            data = np.load(path)
            vectors = StandardScaler().fit_transform(data["vectors"])
            parts = PCA(min(PCA_PARTS, *vectors.shape), random_state=TSNE_SEED).fit_transform(
                vectors
            )
            places = TSNE(
                perplexity=min(PERPLEXITY, len(parts) / 3), init="pca", random_state=TSNE_SEED
            ).fit_transform(parts)
            for plot, labels in zip(pair, ("modality", "lesion_type"), strict=True):
                score = float(silhouette_score(vectors, data[labels]))
                lines.append([path.stem, labels, len(vectors), f"{score:.4f}"])
                for label, colour in zip(np.unique(data[labels]), COLOURS, strict=False):
                    mine = places[data[labels] == label]
                    plot.scatter(*mine.T, s=9, color=colour, label=str(label))
                plot.set_title(
                    f"{path.stem}, by {labels.replace('_', ' ')}: silhouette {score:.2f}"
                )
                plot.set_xticks([])
                plot.set_yticks([])
                plot.legend(fontsize=7)
        _write(folder, "figure-2b", figure, "t-SNE of the bottleneck")
    _write_csv(folder, "figure-2b", ["system", "labels", "images", "silhouette"], lines)


def degeneration(folder: Path) -> None:
    """Figure S1: what each expert adds for images of each modality, with and without curriculum.

    Rows: modality of the image; columns: expert; a cell: the expert's part in the fused logits,
    averaged over the head and the images. Below: the same voxel by voxel on one slice.
    """
    matrices = _share_matrices(folder / "shares.csv")
    wanted = [n for n in ("MoME without curriculum", "MoME") if n in matrices]
    if not wanted:
        return
    lines = []
    maps = {name: _map_of(folder, name) for name in wanted}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(wanted), 9))
        plots = figure.subplots(2, len(wanted), squeeze=False)
        for column, name in enumerate(wanted):
            matrix, plot = matrices[name], plots[0, column]
            entropy = _entropy(matrix)
            plot.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
            for (i, j), share in np.ndenumerate(matrix):
                plot.text(
                    j,
                    i,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    color="w" if share < 0.6 else "k",
                )
            plot.set_xticks(
                range(matrix.shape[1]), [f"expert {m}" for m in MODALITIES], rotation=30
            )
            plot.set_yticks(range(matrix.shape[0]), [f"{m} image" for m in MODALITIES])
            plot.set_title(
                f"{name}: mean entropy {entropy.mean():.2f} of {np.log(len(matrix)):.2f}"
            )
            for modality, row, bits in zip(MODALITIES, matrix, entropy, strict=True):
                lines.append([name, modality, *map(_cell, row), _cell(float(bits))])
            plots[1, column].set_axis_off()
            if maps[name] is not None:
                plots[1, column].imshow(maps[name], cmap="hot")
        _write(folder, "figure-s1", figure, "Part of each expert in the fused logits")
    header = ["system", "image", *(f"expert {m}" for m in MODALITIES), "entropy"]
    _write_csv(folder, "figure-s1", header, lines)


def _share_matrices(path: Path) -> dict[str, NDArray[np.float64]]:
    """System -> (modality of the image, expert), rows summing to 1; over all seeds and cases."""
    if not path.exists():
        return {}
    rows: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            shares = [float(line[f"expert {expert}"]) for expert in MODALITIES]
            rows[line["system"]][line["modality"]].append(shares)
    nothing = [[0.0] * len(MODALITIES)]
    return {
        system: np.array([np.mean(by.get(image, nothing), axis=0) for image in MODALITIES])
        for system, by in rows.items()
    }


def _entropy(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    safe = np.clip(matrix, 1e-12, 1)
    return np.asarray(-(safe * np.log(safe)).sum(axis=1))


def _map_of(folder: Path, name: str) -> NDArray[np.float32] | None:
    """Rows: modalities of one subject; columns: the image, then each expert's share of it."""
    files = sorted((folder / "maps").glob(f"{slug(name)}-[0-9]*.npz"))
    if not files:
        return None
    data = np.load(files[0])
    rows = []
    for modality in (m for m in ("FLAIR", "T2", "T1", "T1ce", "DWI") if f"image {m}" in data):
        image = data[f"image {modality}"].astype(np.float32)
        image = (image - image.min()) / max(float(np.ptp(image)), 1e-6)
        shares = data[f"shares {modality}"].astype(np.float32)
        shares = shares / max(float(np.percentile(shares, 99.5)), 1e-6)
        rows.append(np.concatenate([image[::-1], *(share[::-1] for share in shares)], axis=1))
    return np.asarray(np.clip(np.concatenate(rows), 0, 1), np.float32)


FIGURES: dict[str, Callable[[Path], None]] = {"2a": radar, "2b": embedding, "s1": degeneration}


def _cell(value: float) -> str:
    return f"{value:.4f}"


def _write_csv(
    folder: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    make_folders(folder / "figures")
    write_file(folder / "figures" / f"{name}.csv", text.getvalue().encode())


def _write(folder: Path, name: str, figure: Figure, title: str) -> None:
    figure.suptitle(f"{title}\n{NOTICE}", fontsize=9)
    make_folders(folder / "figures")
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        data = io.BytesIO()
        figure.savefig(data, format=kind, dpi=110, metadata=metadata, bbox_inches="tight")
        write_file(folder / "figures" / f"{name}.{kind}", data.getvalue())
