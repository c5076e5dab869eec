"""An exported file against PyTorch in float32: how far its logits are off, which classes flip."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mome_sdk.bundle import EXAMPLE, ModelBundle
from mome_sdk.engines import Engine, open_engine
from mome_sdk.errors import EngineError
from mome_sdk.exported import NOT_RUN, ExportedModel
from mome_sdk.nifti import read_nifti
from mome_sdk.preprocess.pipeline import prepare
from mome_sdk.sliding_window import SlidingWindow
from mome_sdk.volume import Index3

# Largest difference of the logits, as a part of their range, that is rounding and not a mistake.
LIMITS = {"fp32": 1e-4, "fp16": 5e-2}
# Codes of engines that cannot be opened here though the file may be right.
_NOT_HERE = {"engine.missing", "engine.none", "engine.device"}
_ON_GPU = {"tensorrt", "tensorrt-rtx", "torch-tensorrt"}


def example_windows(bundle: ModelBundle, edges: Index3, count: int) -> NDArray[np.float32]:
    """Normalised windows (count, C, *edges) of the bundled example, brightest to darkest."""
    volume = read_nifti(EXAMPLE / "flair.nii.gz")
    image = prepare(volume, bundle, "mni").volume.array.astype(np.float32)
    missing = [max(0, edge - size) for edge, size in zip(edges, image.shape, strict=True)]
    image = np.pad(image, [(0, gap) for gap in missing])
    d, h, w = image.shape
    boxes = [
        tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))
        for starts in product(*SlidingWindow(edges).starts((d, h, w)))
    ]
    boxes.sort(key=lambda box: -float(image[box].sum()))
    places = np.linspace(0, len(boxes) - 1, count).round().astype(int)
    chosen = np.stack([image[boxes[place]] for place in places])
    return np.repeat(chosen[:, None], bundle.architecture.in_channels, axis=1)


def float32_logits(
    bundle: ModelBundle, windows: NDArray[np.float32]
) -> tuple[NDArray[np.float32], str]:
    """What the network itself gives for windows, one by one, and what computed it.

    Raises:
        EngineError: `engine.not-finite`.
    """
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    engine = open_engine(bundle, "torch", device=device, precision="fp32")
    logits = _run(engine, windows, batch=1)
    engine.close()
    if not np.isfinite(logits).all():
        raise EngineError(
            "engine.not-finite",
            f"The network of {bundle.name} gives NaN or infinity in float32.",
            hint="Its weights cannot be right.",
        )
    return logits, f"PyTorch {torch.__version__}, float32, {device}"


def measure(model: ExportedModel) -> dict[str, Any] | str:
    """Run an export on its reference windows.

    Returns:
        Parity as export.json holds it; NOT_RUN if no engine here runs the file.

    Raises:
        EngineError: `engine.parity`, it is further off than its precision explains;
            `engine.failed`.
    """
    device = "cuda:0" if model.target in _ON_GPU else "cpu"
    try:
        engine = open_engine(model, device=device)
    except EngineError as error:
        if error.code in _NOT_HERE:
            return NOT_RUN
        raise
    windows, expected, against = model.reference()
    found = _run(engine, windows, batch=engine.batch or len(windows))
    where = f"{engine.name}, {engine.device}"
    engine.close()
    parity = compare(found, expected)
    limit = LIMITS[model.precision]
    if not parity["max_of_range"] <= limit:
        raise EngineError(
            "engine.parity",
            f"The logits of the {model.target} file are off by {parity['max_of_range']:.1e} of "
            f"their range, and {parity['flips']} of {parity['voxels']} voxels get another class.",
            hint=f"At most {limit:g} is rounding in {model.precision}. Export in fp32, and report "
            "this.",
        )
    return {**parity, "against": against, "where": where}


def compare(found: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, Any]:
    """Differences of logits (B, N, D, H, W), as parts of the range of the expected ones."""
    difference = found.astype(np.float64) - expected
    extent = float(np.ptp(expected)) or 1.0
    other = found.argmax(axis=1) != expected.argmax(axis=1)
    return {
        "max_of_range": float(np.abs(difference).max()) / extent,
        "rms": float(np.sqrt(np.square(difference).mean())) / extent,
        "flips": int(np.count_nonzero(other)),
        "voxels": other.size,
    }


def _run(engine: Engine, windows: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    logits = np.full((len(windows), engine.classes, *windows.shape[2:]), np.nan, np.float32)
    for first in range(0, len(windows), batch):
        part = slice(first, first + batch)
        engine.run(windows[part], logits[part])
    return logits
