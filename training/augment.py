"""nnU-Net's augmentation, by the transforms of batchgeneratorsv2.

Order and numbers are those of nnU-Net 2.2, which the published training used; the library resamples
the image linearly where 2.2 used cubic splines.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from .config import Index3

ROTATION = np.deg2rad(30.0)
SCALE = (0.7, 1.4)
SMALLEST_SCALE = 0.85  # of nnU-Net's rule for the initial patch
Augment = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def initial_patch(patch: Index3) -> Index3:
    """The box to read, so that a rotated and scaled patch of it has hardly an empty corner.

    nnU-Net's rule: the largest extent of the patch turned by 30 degrees about one axis or another,
    divided by 0.85; 205 for 128.
    """
    cos, sin = np.cos(ROTATION), np.sin(ROTATION)
    a, b, c = patch
    turned = (a * cos + b * sin, b * cos + c * sin, a * sin + c * cos)
    z, y, x = (int(max(pair) / SMALLEST_SCALE) for pair in zip(patch, turned, strict=True))
    return z, y, x


@lru_cache(maxsize=8)
def augmentation(patch: Index3) -> Augment:
    """What turns a box of the initial size into an augmented patch.

    Returns:
        (image (C, *initial), lesion (*initial), seed) -> image (C, *patch), lesion (*patch). The
        same seed gives the same patch; the arguments are left alone.
    """
    transforms = _transforms(patch)

    def augment(image: Tensor, lesion: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with _seeded(seed):
            done = transforms(image=image.clone(), segmentation=lesion[None].to(torch.int16))
        return done["image"], done["segmentation"][0].clamp_min(0).to(torch.uint8)

    return augment


def _transforms(patch: Index3) -> BasicTransform:
    """In nnU-Net's order; a comment gives the share of patches where it is not the first number."""
    half_below = BGContrast((0.75, 1.25))
    gamma = BGContrast((0.7, 1.5))
    return ComposeTransforms(
        [
            SpatialTransform(
                patch,
                patch_center_dist_from_border=0,
                random_crop=False,
                p_rotation=0.2,
                rotation=(-ROTATION, ROTATION),
                p_scaling=0.2,
                scaling=SCALE,
                p_synchronize_scaling_across_axes=1,
                border_mode_seg="constant",
                padding_value_seg=-1,
            ),
            RandomTransform(GaussianNoiseTransform((0, 0.1), synchronize_channels=True), 0.1),
            RandomTransform(GaussianBlurTransform((0.5, 1.0), p_per_channel=0.5), 0.2),  # .1
            RandomTransform(
                MultiplicativeBrightnessTransform(half_below, synchronize_channels=False), 0.15
            ),
            RandomTransform(ContrastTransform(half_below, True, synchronize_channels=False), 0.15),
            RandomTransform(
                SimulateLowResolutionTransform((0.5, 1), False, True, (), p_per_channel=0.5), 0.25
            ),  # .125
            RandomTransform(GammaTransform(gamma, 1, False, 1, 1), 0.1),  # of the inverted image
            RandomTransform(GammaTransform(gamma, 0, False, 1, 1), 0.3),
            MirrorTransform((0, 1, 2)),
        ]
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The library draws from the global generators: they are set for it and given back."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
