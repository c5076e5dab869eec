"""Slow and obvious NumPy twins of the C++ core, in float64: what is computed, not how."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Index3 = tuple[int, int, int]
Array = NDArray[np.generic]


def window_starts(shape: Index3, patch: Index3, step: float) -> tuple[list[int], ...]:
    """Starts along each axis: nnU-Net 2, compute_steps_for_sliding_window."""
    starts = []
    for size, edge in zip(shape, patch, strict=True):
        last = max(0, size - edge)
        count = int(np.ceil(last / (edge * step))) + 1
        starts.append([int(np.round(last / max(1, count - 1) * i)) for i in range(count)])
    return tuple(starts)


def window_weights(patch: Index3, dtype: type[np.floating]) -> NDArray[np.floating]:
    """Window weights (D, H, W): nnU-Net 2.2, compute_gaussian, scale 1000."""
    impulse = np.zeros(patch)
    impulse[tuple(edge // 2 for edge in patch)] = 1.0
    sigmas = [edge / 8 for edge in patch]
    table = ndimage.gaussian_filter(impulse, sigmas, mode="constant", truncate=4.0)
    # float64 goes to half precision by way of float32, as torch does it.
    table = table.astype(np.float32).astype(dtype)
    table = table / table.max() * dtype(1000)
    table[table == 0] = table[table > 0].min()
    return table


def sliding_window(
    engine: Callable[[Array], Array],
    image: NDArray[np.float32],
    patch: Index3,
    step: float,
    mirror: tuple[int, ...],
    weights: Array,
) -> NDArray[np.float64]:
    """Blended maps (M, D, H, W) of an image (C, D, H, W).

    `engine` turns one window (C, *patch) into maps (M, *patch).
    """
    shape = image.shape[1:]
    missing = [max(0, edge - size) for size, edge in zip(shape, patch, strict=True)]
    padded = np.pad(image, [(0, 0), *((d // 2, d - d // 2) for d in missing)])
    flips = list(chain.from_iterable(combinations(mirror, n) for n in range(len(mirror) + 1)))
    sums: dict[int, NDArray[np.float64]] = {}
    total = np.zeros(padded.shape[1:])
    for start in product(*window_starts(padded.shape[1:], patch, step)):
        box = tuple(slice(s, s + edge) for s, edge in zip(start, patch, strict=True))
        window = padded[(slice(None), *box)]
        total[box] += weights
        for flip in flips:
            axes = tuple(1 + axis for axis in flip)
            maps = np.flip(engine(np.flip(window, axes)), axes).astype(np.float64)
            for m, values in enumerate(maps):
                sums.setdefault(m, np.zeros_like(total))[box] += values * weights / len(flips)
    inside = tuple(slice(d // 2, d // 2 + size) for d, size in zip(missing, shape, strict=True))
    return np.stack([values[inside] / total[inside] for values in sums.values()])


def resample(source: Array, matrix: Array, shape: Index3, mode: str, fill: float) -> Array:
    """A volume (I, J, K) at matrix @ (i, j, k, 1) for every voxel of `shape`."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    at = (matrix[:3, :3] @ index + matrix[:3, 3:]).reshape(3, *shape)
    if mode == "nearest":
        nearest = np.floor(at + 0.5).astype(np.int64)
        inside = np.logical_and.reduce(
            [(nearest[a] >= 0) & (nearest[a] < source.shape[a]) for a in range(3)]
        )
        clipped = [np.clip(nearest[a], 0, source.shape[a] - 1) for a in range(3)]
        return np.where(inside, source[tuple(clipped)], fill)
    return ndimage.map_coordinates(
        source.astype(np.float64), at, order=1, mode="grid-constant", cval=fill
    )


def zscore(array: Array) -> NDArray[np.float64]:
    """(array - mean) / population standard deviation."""
    values = array.astype(np.float64)
    return (values - values.mean()) / values.std()


def connected_components(mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
    """Components (26 neighbours) of every class, the largest first, then the first in the array."""
    found = []
    for label in np.unique(mask[mask > 0]):
        parts, count = ndimage.label(mask == label, np.ones((3, 3, 3)))
        found += [parts == part for part in range(1, count + 1)]
    found.sort(key=lambda part: (-part.sum(), np.flatnonzero(part)[0]))
    labels = np.zeros(mask.shape, np.int32)
    for name, part in enumerate(found, start=1):
        labels[part] = name
    return labels, len(found)


def activation(array: Array, scale: Array, shift: Array, slope: float) -> NDArray[np.float64]:
    """Scale and shift of every channel of (C, D, H, W), then LeakyReLU."""
    scaled = array * scale.astype(np.float64).reshape(-1, 1, 1, 1) + shift.reshape(-1, 1, 1, 1)
    return np.maximum(scaled, float(np.float32(slope)) * scaled)


def convolution(array: Array, weights: Array, stride: int = 1) -> NDArray[np.float64]:
    """3x3x3, zero padding 1: (C, D, H, W) with weights (Co, C, 3, 3, 3)."""
    depth, height, width = array.shape[1:]
    padded = np.pad(array.astype(np.float64), [(0, 0), (1, 1), (1, 1), (1, 1)])
    taps = weights.astype(np.float64)
    return sum(
        np.tensordot(
            taps[:, :, i, j, k],
            padded[:, i : i + depth : stride, j : j + height : stride, k : k + width : stride],
            1,
        )
        for i, j, k in product(range(3), repeat=3)
    )


def upsampling(array: Array, weights: Array, bias: Array) -> NDArray[np.float64]:
    """2x2x2 transposed, stride 2: (C, D, H, W) with weights (C, Co, 2, 2, 2)."""
    result = np.empty((weights.shape[1], *(2 * edge for edge in array.shape[1:])))
    for i, j, k in product(range(2), repeat=3):
        tap = weights[:, :, i, j, k].astype(np.float64).T
        result[:, i::2, j::2, k::2] = np.tensordot(tap, array.astype(np.float64), 1)
    return result + bias.reshape(-1, 1, 1, 1)


def instance_norm(array: Array, gamma: Array, beta: Array, eps: float) -> NDArray[np.float64]:
    """Every channel of (C, D, H, W) by its own mean and biased variance."""
    values = array.astype(np.float64)
    mean = values.mean((1, 2, 3), keepdims=True)
    deviation = np.sqrt(values.var((1, 2, 3), keepdims=True) + eps)
    return gamma.reshape(-1, 1, 1, 1) * (values - mean) / deviation + beta.reshape(-1, 1, 1, 1)
