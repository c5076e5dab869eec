"""What is measured: the published network at full size, and the bundled example as its input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import mome_sdk
from mome_sdk.architecture import LEAKY_SLOPE, Architecture
from mome_sdk.bundle import MODALITIES, ModelBundle, create_bundle
from mome_sdk.errors import BundleError
from mome_sdk.export.graph import write_graph
from mome_sdk.nifti import read_nifti
from mome_sdk.preprocess.pipeline import prepare
from mome_sdk.volume import Index3

FULL_SIZE = Architecture(
    features=(32, 64, 128, 256, 320, 320),
    strides=(1, 2, 2, 2, 2, 2),
    encoder_convs=(2,) * 6,
    decoder_convs=(2,) * 5,
)
FULL_SIZE_PATCH = (128, 128, 128)
EXAMPLE = Path(mome_sdk.__file__).parent / "data" / "example" / "flair.nii.gz"

_SOURCE = {"source": "random numbers for benchmarks, numpy default_rng(0), float32"}


def full_size_bundle(path: Path) -> ModelBundle:
    """The published architecture with random weights; written at the first call, 0.75 GB.

    Raises:
        BundleError: `bundle.not-random`, there is another bundle at `path`.
    """
    if not path.exists():
        return random_bundle(path, FULL_SIZE, FULL_SIZE_PATCH)
    bundle = ModelBundle.load(path)
    if (bundle.manifest["training"], bundle.architecture) != (_SOURCE, FULL_SIZE):
        raise BundleError(
            "bundle.not-random",
            f"{str(path)!r} is not the bundle that benchmarks write there.",
            hint="Name another output folder.",
        )
    return bundle


def random_bundle(path: Path, architecture: Architecture, patch: Index3) -> ModelBundle:
    """A bundle of random weights, the same for every call."""
    return create_bundle(
        path,
        architecture,
        random_tensors(architecture),
        name="random weights",
        modalities=MODALITIES[: architecture.experts],
        patch=patch,
        blend="exact",
        training=_SOURCE,
        graph=write_graph,
    )


def random_tensors(architecture: Architecture) -> dict[str, NDArray[np.float32]]:
    """Weights on the scale of training's start; nothing is zero or one by default.

    Convolutions have He's standard deviation for the network's LeakyReLU (the fan of a transposed
    one counted as PyTorch does), heads half of it; biases 0.1 x normal, norms 1 + 0.1 x normal.
    """
    generator = np.random.default_rng(0)
    tensors = {}
    for name, shape in architecture.tensor_shapes().items():
        values = generator.standard_normal(shape, np.float32)
        if len(shape) > 1:
            deviation = math.sqrt(2.0 / (1.0 + LEAKY_SLOPE**2) / math.prod(shape[1:]))
            values *= np.float32(deviation / 2 if ".seg_layers." in name else deviation)
        else:
            values *= np.float32(0.1)
            values += np.float32(name.endswith("norm.weight"))
        tensors[name] = values
    return tensors


def window_gflop(architecture: Architecture, patch: Index3) -> float:
    """Floating-point operations of one window, in 1e9, two for each multiplication.

    Those of the convolutions, computed directly, that the fused full-resolution logits need.
    """
    last = architecture.stages - 2
    multiplications = 0
    for name, shape in architecture.tensor_shapes().items():
        parts = name.removeprefix("gate.").split(".")
        parts = parts[2:] if parts[0] == "experts" else parts
        if len(shape) == 1 or (parts[1] == "seg_layers" and int(parts[2]) != last):
            continue
        level = int(parts[2]) if parts[0] == "encoder" else last - int(parts[2])
        taps = math.prod(shape[:2] if parts[1] == "transpconvs" else shape)
        multiplications += taps * math.prod(edge >> level for edge in patch)
    return 2e-9 * multiplications


def example_image(bundle: ModelBundle, shape: Index3) -> NDArray[np.float32]:
    """The bundled example as the network sees it, (1, D, H, W).

    Normalised on the model's grid; the centre of that size, continued by reflection where it is
    larger than the grid.
    """
    array = prepare(read_nifti(EXAMPLE), bundle, "mni").volume.array
    margins = [max(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
    array = np.pad(array, [(m // 2, m - m // 2) for m in margins], mode="symmetric")
    starts = [(have - size) // 2 for size, have in zip(shape, array.shape, strict=True)]
    box = tuple(slice(s, s + size) for s, size in zip(starts, shape, strict=True))
    return np.ascontiguousarray(array[box])[np.newaxis]
