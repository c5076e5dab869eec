"""SAM-Med3D: clicks go where the mask is wrong; depth, height and width are not mixed up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mome_sdk.training.batch import Batch, Origin
from mome_sdk.training.comparators.sam_med3d import (
    NOT_A_POINT,
    TEST_CLICKS,
    SamConfig,
    SamMed3D,
    _boxed,
    draw_clicks,
)

CONFIG = SamConfig(
    size=(16, 12, 8), patch=4, dim=24, depth=1, heads=2, global_blocks=(0,), window=3, out_dim=24,
    decoder_mlp=32, decoder_heads=2, clicks=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def system() -> SamMed3D:
    torch.manual_seed(0)
    return SamMed3D(CONFIG)


def test_a_click_is_a_wrong_voxel_and_says_which_way():
    found = torch.zeros(3, 4, 4, 4, dtype=torch.uint8)
    truth = torch.zeros_like(found)
    truth[0, 1, 2, 3] = 1  # missed
    found[1, 3, 0, 1] = 1  # made up
    clicks = draw_clicks(found, truth, np.random.default_rng(0))
    assert clicks.voxels[:2].tolist() == [[1, 2, 3], [3, 0, 1]]
    assert clicks.labels.tolist() == [1, 0, NOT_A_POINT]  # nothing to click at in the third


def test_a_click_lies_in_the_token_that_it_is_in(system):
    """The encoding of a voxel is nearest to that of its own token's middle."""
    prompts = system.network.prompts
    grid = prompts.image_positions().flatten(1).T
    for voxel in ((1, 2, 6), (14, 6, 1), (9, 10, 2)):
        place = (torch.tensor(voxel) + 0.5) / torch.tensor(CONFIG.size)
        nearest = int((grid - prompts.positions(place)).norm(dim=1).argmin())
        assert tuple(np.unravel_index(nearest, CONFIG.grid)) == tuple(v // 4 for v in voxel)


def test_position_tables_bias_along_their_own_axis(system):
    """A table for height shifts attention between rows, and between nothing else."""
    attention = system.network.encoder.blocks[0].attention
    with torch.no_grad():
        for table in attention.tables:
            table.zero_()
        attention.tables[1][len(attention.tables[1]) // 2 + 1] = 1.0  # one step in height
        q = torch.ones(1, 2, 24, 12)
        bias = attention._bias(q)[0, 0].reshape(*CONFIG.grid, *CONFIG.grid)
    d, h, w = CONFIG.grid
    assert (d, h, w) == (4, 3, 2)
    for i, j in np.ndindex(h, h):
        expected = 12.0 if i - j == 1 else 0.0
        torch.testing.assert_close(bias[:, i, :, :, j, :], torch.full((d, w, d, w), expected))
    with torch.no_grad():
        attention.tables[1].zero_()


def test_clicks_of_a_case_repeat_and_end_on_a_perfect_mask(system):
    image = np.random.default_rng(0).normal(size=(1, 18, 12, 10)).astype(np.float32)
    truth = np.zeros((18, 12, 10), np.uint8)
    truth[5:9, 4:8, 3:6] = 1
    first, again = (list(system.click_masks(image, truth)) for _ in range(2))
    assert len(first) == TEST_CLICKS
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == truth.shape
        assert not a[0].any()  # outside of the box of 16
    nothing = list(system.click_masks(image, np.zeros_like(truth)))
    assert not any(mask.any() for mask in nothing)  # right from the start: no click


def test_an_empty_mask_can_be_trained_on(system):
    lesion = torch.zeros(1, 16, 12, 8, dtype=torch.uint8)
    loss = system.loss(Batch(torch.randn(1, 1, 16, 12, 8), lesion, (Origin("T1"),)), 0.0)
    assert torch.isfinite(loss)


def test_a_box_is_cut_and_put_back_about_the_middle():
    x = torch.arange(7 * 5 * 4, dtype=torch.float32).reshape(1, 7, 5, 4)
    boxed = _boxed(x, (4, 6, 4))
    assert boxed.shape == (1, 4, 6, 4)
    back = _boxed(boxed, (7, 5, 4))
    inside = back != 0
    assert torch.equal(back[inside], x[inside])
    assert int(inside.sum()) == 4 * 5 * 4
