"""Augmentation: nnU-Net's initial patch, the same patch from the same seed, mask on the image."""

from __future__ import annotations

import numpy as np
import torch

from mome_sdk.training.augment import augmentation, initial_patch

PATCH = (16, 16, 16)


def box() -> tuple[torch.Tensor, torch.Tensor]:
    size = initial_patch(PATCH)
    lesion = torch.zeros(size, dtype=torch.uint8)
    middle = [edge // 2 for edge in size]
    lesion[middle[0] - 3 : middle[0] + 2, middle[1] : middle[1] + 5, middle[2] - 2 : middle[2]] = 1
    return 10.0 * lesion[None], lesion


def test_the_initial_patch_is_nnunets():
    """205 for 128 (published plans); the others are nnunetv2 2.8.1's `get_patch_size`."""
    assert initial_patch((128, 128, 128)) == (205, 205, 205)
    assert initial_patch((128, 112, 160)) == (196, 208, 238)


def test_the_same_seed_gives_the_same_patch_and_leaves_the_generators_alone():
    image, lesion = box()
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    first = augmentation(PATCH)(image, lesion, 11)
    assert (torch.rand(1), np.random.rand()) == before
    again = augmentation(PATCH)(image, lesion, 11)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (1, *PATCH)
    assert image.max() == 10.0


def test_image_and_mask_move_together():
    """A bright lesion stays under its mask, whatever is turned, scaled or mirrored."""
    image, lesion = box()
    patches, moved = [], 0
    for seed in range(60):
        voxels, mask = augmentation(PATCH)(image, lesion, seed)
        assert set(mask.unique().tolist()) == {0, 1}
        inside = mask == 1
        assert float(voxels[0][inside].mean()) > float(voxels[0][~inside].mean()) + 3
        moved += not any(torch.equal(mask, other) for other in patches)
        patches.append(mask)
    assert moved >= 8  # eight mirrors, and some turned and scaled


def test_outside_of_a_turned_box_is_background():
    lesion = torch.ones(initial_patch(PATCH), dtype=torch.uint8)
    for seed in range(20):
        _, mask = augmentation(PATCH)(torch.zeros(1, *lesion.shape), lesion, seed)
        assert int(mask.max()) <= 1
