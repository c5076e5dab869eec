"""What the engines are compared with: compiled PyTorch, and the sliding windows of others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines.torch import EagerNetwork, TorchEngine
from mome_sdk.model import Blend
from mome_sdk.network import MoME
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.preprocess.pipeline import prepare, restore
from mome_sdk.volume import Index3, Volume

from .measure import Sample
from .worker import COMPILED

Forward = Callable[[Tensor], Tensor]  # windows (B, C, D, H, W) -> fused logits (B, N, D, H, W)
Predictor = Callable[[Tensor], Tensor]  # image (C, D, H, W) -> logits (N, D, H, W)
LogitsAt = Callable[[Index3], Tensor]  # first voxel of a window -> its logits (N, D, H, W)
Starts = Sequence[Sequence[int]]  # first voxels of the windows along D, H, W


class CompiledEngine(TorchEngine):
    """The torch engine through torch.compile, which builds C++ at the first window."""

    name = COMPILED

    def __init__(self, bundle: ModelBundle, *, threads: int | None) -> None:
        super().__init__(bundle, "cpu", "fp32", threads or _core.default_threads())
        assert isinstance(self._network, EagerNetwork)
        self._network.module.compile()


class PublishedScan:
    """From .nii.gz to .nii.gz with the published predictor: PyTorch in float32, unmirrored.

    On the CPU it does not autocast. Its window weights and sums are half precision. What comes
    before and after it is ours.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self._bundle = ModelBundle.load(job["bundle"])
        self._network = FusedLogits(self._bundle)
        self._image = Path(job["image"])
        self._folder = Path(job["folder"])

    def logits(self) -> NDArray[np.float32]:
        return self._predicted(torch.from_numpy(np.load(self._folder / "window.npy")))

    def __call__(self) -> Sample:
        clock = [time.perf_counter()]
        image = read_nifti(self._image)
        clock.append(time.perf_counter())
        prepared = prepare(image, self._bundle, "mni")
        clock.append(time.perf_counter())
        logits = self._predicted(torch.tensor(prepared.volume.array)[None])
        clock.append(time.perf_counter())
        mask, _ = restore(_core.softmax(logits), prepared)
        clock.append(time.perf_counter())
        write_nifti(Volume(mask, image.affine), self._folder / "published.nii.gz")
        clock.append(time.perf_counter())
        stages = ("read", "prepare", "network", "restore", "write")
        return {stage: clock[i + 1] - clock[i] for i, stage in enumerate(stages)}

    @torch.inference_mode()
    def _predicted(self, image: Tensor) -> NDArray[np.float32]:
        patch, (d, h, w) = self._bundle.patch, image.shape[1:]
        starts = _core.window_starts((d, h, w), patch, 0.5)
        weights = window_weights(patch, "authors", torch.float16)
        logits_at = at_corners(self._network, image, patch)
        found: NDArray[np.float32] = blended(logits_at, (d, h, w), starts, weights).float().numpy()
        return found


class FusedLogits(nn.Module):
    """MoME as a network of one output, as other people's predictors expect it."""

    def __init__(self, bundle: ModelBundle) -> None:
        super().__init__()
        self.network = MoME(bundle.architecture)
        state = {name: torch.from_numpy(array.copy()) for name, array in bundle.tensors.items()}
        self.network.load_state_dict(state)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Fused logits (B, N, D, H, W) of windows (B, C, D, H, W)."""
        logits: Tensor = self.network(x).fused[0]
        return logits


def mirrored(forward: Forward, axes: Sequence[int]) -> Forward:
    """The mean over all subsets of flipped axes, of 0 (D), 1 (H) and 2 (W), one after the other."""
    flips = [[a + 2 for a in c] for n in range(len(axes) + 1) for c in combinations(axes, n)]

    def mean(x: Tensor) -> Tensor:
        total = forward(x)
        for flip in flips[1:]:
            total = total + forward(x.flip(flip)).flip(flip)
        return total / len(flips)

    return mean


def at_corners(forward: Forward, image: Tensor, patch: Index3) -> LogitsAt:
    """The network on the window of an image (C, D, H, W) that begins at a voxel."""

    def logits_at(corner: Index3) -> Tensor:
        return forward(image[(slice(None), *_box(corner, patch))][None])[0]

    return logits_at


def blended(logits_at: LogitsAt, shape: Index3, starts: Starts, weights: Tensor) -> Tensor:
    """Window after window, logits times weights added up and divided, in the weights' type.

    With float64 weights this is the definition that others are compared with; with the published
    ones in float16 (`_core.window_weights(patch, "authors")`) it is the published predictor.

    Args:
        logits_at: Logits (N, D, H, W) of the window at a corner.
        shape: Of the image (D, H, W), no axis shorter than a window.
        starts: First voxels of the windows along each axis.
        weights: Of the voxels of a window, (D, H, W), on the device of the logits.
    """
    weight = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
    total: Tensor | None = None
    for d, h, w in product(*starts):
        box = _box((d, h, w), weights.shape)
        logits = logits_at((d, h, w))
        if total is None:
            total = weight.new_zeros((logits.shape[0], *shape))
        total[(slice(None), *box)] += logits * weights
        weight[box] += weights
    assert total is not None
    return total / weight


def _box(corner: Index3, patch: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + edge) for start, edge in zip(corner, patch, strict=True))


def window_weights(patch: Index3, blend: Blend, dtype: torch.dtype) -> Tensor:
    """`_core.window_weights` as a tensor."""
    return torch.from_numpy(_core.window_weights(patch, blend)).to(dtype)


def nnunet(network: nn.Module, patch: Index3, mirror: Sequence[int], classes: int) -> Predictor:
    """nnU-Net's own predictor: its windows and Gaussian, summed in float16."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with redirect_stdout(sys.stderr):  # it prints; standard output is for the table
        predictor = nnUNetPredictor(
            tile_step_size=0.5,
            use_mirroring=bool(mirror),
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
    # All that prediction from an array asks of plans and data set.
    predictor.network = network
    predictor.allowed_mirroring_axes = tuple(mirror)
    predictor.configuration_manager = SimpleNamespace(patch_size=patch)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=classes)
    predict: Predictor = predictor.predict_sliding_window_return_logits
    return predict


def monai(forward: Forward, weights: Tensor, *, batch: int) -> Predictor:
    """MONAI's inferer, half a window apart, with our window weights (D, H, W)."""
    from monai.inferers import SlidingWindowInferer

    inferer: Any = SlidingWindowInferer(
        roi_size=tuple(weights.shape), sw_batch_size=batch, overlap=0.5, mode="gaussian"
    )
    inferer.roi_weight_map = weights

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        logits: Tensor = inferer(image[None], forward)[0]
        return logits

    return predict


def monai_starts(shape: Sequence[int], patch: Index3) -> list[list[int]]:
    """Where MONAI lays its windows: half a window apart, the last one moved back to the edge."""
    return [
        sorted({min(start, max(0, size - edge)) for start in range(0, size - edge // 2, edge // 2)})
        for size, edge in zip(shape, patch, strict=True)
    ]
