"""Scores of two masks on toys whose values can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mome_sdk.training.metrics import (
    brats_lesionwise,
    dice,
    hd95,
    isles_detection,
    lesions_of,
    msseg_detection,
    wmh_detection,
)

MM = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([1, 1, 0, 0], [0, 1, 1, 0], 0.5),
        ([1, 0, 0, 0], [0, 0, 0, 1], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        ([0, 0, 0, 0], [1, 0, 0, 0], 0.0),
        ([2, 3, 0, 0], [1, 1, 0, 0], 1.0),
    ],
)
def test_dice(first, second, expected):
    assert dice(np.array(first), np.array(second)) == pytest.approx(expected)


def test_dice_of_two_empty_masks_may_be_left_out():
    nothing = np.zeros(4)
    assert np.isnan(dice(nothing, nothing, empty=float("nan")))


def boxes(*corners: tuple[tuple[int, int, int], int], shape=(40, 40, 40)) -> np.ndarray:
    """Cubes of (first voxel, edge)."""
    mask = np.zeros(shape, np.uint8)
    for (z, y, x), edge in corners:
        mask[z : z + edge, y : y + edge, x : x + edge] = 1
    return mask


EMPTY = boxes()
ONE = boxes(((5, 5, 5), 6))
TWO = boxes(((5, 5, 5), 6), ((25, 25, 25), 6))


def test_distance_of_surfaces_is_in_millimetres():
    moved = boxes(((8, 5, 5), 6))
    assert hd95(ONE, ONE, MM) == 0.0
    assert hd95(moved, ONE, (2.0, 1.0, 1.0)) == pytest.approx(2 * hd95(moved, ONE, MM))
    assert hd95(moved, ONE, MM) == pytest.approx(3.0)
    assert hd95(EMPTY, EMPTY, MM) == 0.0
    assert hd95(EMPTY, ONE, MM) == hd95(ONE, EMPTY, MM) == float("inf")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of MONAI, to itself
def test_distance_is_monais():
    metrics = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for _ in range(3):
        first, second = (
            boxes(*[(tuple(rng.integers(0, 30, 3)), int(rng.integers(2, 9))) for _ in range(3)])
            for _ in range(2)
        )
        tensors = [torch.from_numpy(mask)[None, None].float() for mask in (first, second)]
        expected = metrics.compute_hausdorff_distance(
            *tensors, include_background=True, percentile=95, spacing=[1.5, 1.0, 2.0]
        )
        assert hd95(first, second, (1.5, 1.0, 2.0)) == pytest.approx(float(expected), abs=1e-4)


def test_lesions_touch_by_corners():
    mask = np.zeros((4, 4, 4))
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = 1
    assert lesions_of(mask)[1] == 2


@pytest.mark.parametrize(
    ("found", "known", "f1"),
    [
        (EMPTY, EMPTY, 1.0),
        (EMPTY, ONE, 0.0),
        (ONE, EMPTY, 0.0),
        (ONE, TWO, 2 / 3),  # one found, one missed
        (TWO, ONE, 2 / 3),  # one found, one made up
        (boxes(((5, 5, 5), 1)), ONE, 1.0),  # a voxel is enough
        (boxes(((5, 5, 5), 2), ((9, 9, 9), 2)), ONE, 1.0),  # a split one is found once
        (boxes(((5, 5, 5), 26)), TWO, 1.0),  # merged: both are found
    ],
)
def test_isles(found, known, f1):
    assert isles_detection(found, known).f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    ("found", "known", "recall", "precision"),
    [
        (EMPTY, EMPTY, 1.0, 1.0),
        (EMPTY, ONE, 0.0, 1.0),
        (ONE, EMPTY, 1.0, 0.0),
        (ONE, TWO, 0.5, 1.0),
        (TWO, ONE, 1.0, 0.5),
    ],
)
def test_wmh(found, known, recall, precision):
    scores = wmh_detection(found, known)
    assert scores[:2] == (recall, precision)
    total = recall + precision
    assert scores.f1 == pytest.approx(2 * recall * precision / total if total else 0.0)


def test_brats_counts_missed_and_made_up_lesions():
    assert brats_lesionwise(EMPTY, EMPTY, MM) == (1.0, 0.0)
    assert brats_lesionwise(ONE, ONE, MM) == (1.0, 0.0)
    assert brats_lesionwise(ONE, TWO, MM) == (0.5, 187.0)
    assert brats_lesionwise(TWO, ONE, MM) == (0.5, 187.0)
    assert brats_lesionwise(ONE, EMPTY, MM) == (0.0, 374.0)


def test_brats_merges_what_touches_after_dilation_and_drops_what_is_small():
    near = boxes(((5, 5, 5), 6), ((5, 5, 15), 6))  # four voxels between: they merge
    assert brats_lesionwise(ONE, near, MM).dice == pytest.approx(dice(ONE, near))
    far = boxes(((5, 5, 5), 6), ((5, 5, 20), 6))
    assert brats_lesionwise(ONE, far, MM).dice == pytest.approx(0.5)
    small = boxes(((5, 5, 5), 6), ((25, 25, 25), 3))  # 27 voxels: left out, found or not
    assert brats_lesionwise(ONE, small, MM).dice == 1.0
    assert brats_lesionwise(small, small, MM).dice == 1.0


def test_brats_takes_what_touches_the_surroundings():
    beside = boxes(((5, 5, 5), 6), ((5, 5, 13), 3))  # within three voxels of the lesion
    assert brats_lesionwise(beside, ONE, MM).dice == pytest.approx(dice(beside, ONE))


def test_msseg_needs_a_tenth_of_a_lesion_and_little_outside():
    assert msseg_detection(ONE, TWO, MM)[:2] == (0.5, 1.0)
    assert msseg_detection(EMPTY, ONE, MM)[:2] == (0.0, 1.0)
    corner = boxes(((5, 5, 5), 2))  # 8 of 216 voxels: 4 %
    assert msseg_detection(corner, ONE, MM).recall == 0.0
    part = boxes(((5, 5, 5), 3))  # 27 of 216: 12.5 %, all inside
    assert msseg_detection(part, ONE, MM).recall == 1.0
    wide = boxes(((5, 5, 5), 10))  # 216 of 1000 inside: 78 % outside
    assert msseg_detection(wide, ONE, MM).recall == 0.0
    tiny = boxes(((5, 5, 5), 1))  # 1 mm^3 is no lesion
    assert msseg_detection(EMPTY, tiny, MM).recall == 1.0
