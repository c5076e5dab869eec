"""Patches as nnU-Net draws them: which are centred on a lesion, where the others may lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mome_sdk.nifti import write_nifti
from mome_sdk.training.batch import batch_of
from mome_sdk.training.dataset import Cached, Scan, build_cache
from mome_sdk.training.sampling import (
    SamplingOptions,
    case_probabilities,
    draw_corner,
    is_forced,
    read_box,
    scan_source,
)
from mome_sdk.volume import Volume

SHAPE = (20, 24, 18)
OPTIONS = SamplingOptions(patch=(8, 8, 8), batch=2, seed=1, stream=5)


def made(shape=SHAPE, voxel=(3, 20, 9)) -> Cached:
    """An image whose voxels number themselves; a lesion of one voxel."""
    image = np.arange(np.prod(shape)).reshape(shape).astype(np.float32)
    lesion = np.zeros(shape, np.uint8)
    lesion[voxel] = 1
    return Cached(image, lesion, np.array([voxel], np.int16))


@pytest.mark.parametrize(
    ("batch", "forced"), [(1, []), (2, [1]), (3, [2]), (4, [3]), (12, [8, 9, 10, 11])]
)
def test_the_last_third_of_a_batch_is_forced(batch, forced):
    assert [n for n in range(batch) if is_forced(n, batch)] == forced


def test_a_forced_patch_has_the_lesion_voxel_in_its_middle():
    case, rng = made(), np.random.default_rng(0)
    for _ in range(20):
        corner = draw_corner(case, (8, 8, 8), (8, 8, 8), rng, forced=True)
        assert corner == (0, 16, 5)  # 3 - 4 is below the image: moved up to its edge
        _, lesion = read_box(case, corner, (8, 8, 8))
        assert lesion.sum() == 1


def test_beyond_the_edge_there_are_zeros():
    case = made()
    image, lesion = read_box(case, (-2, 20, 14), (8, 8, 8))
    assert not image[0, :2].any()
    assert not image[0, :, 4:].any()
    assert not image[0, :, :, 4:].any()
    np.testing.assert_array_equal(image[0, 2:, :4, :4], case.image[:6, 20:, 14:])
    assert lesion[5, 0, :].sum() == 0


@given(
    shape=st.tuples(*[st.integers(4, 24)] * 3),
    patch=st.tuples(*[st.integers(4, 16)] * 3),
    margin=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_a_random_corner_is_where_nnunet_allows_it(shape, patch, margin, seed):
    box = tuple(edge + margin for edge in patch)
    case, rng = made(shape, (0, 0, 0)), np.random.default_rng(seed)
    corner = draw_corner(case, box, patch, rng, forced=False)
    for first, edge, final, size in zip(corner, box, patch, shape, strict=True):
        pad = max(edge - final, edge - size)
        assert -(pad // 2) <= first <= size + pad // 2 + pad % 2 - edge


def scan(dataset: str, number: int, modality: str = "T1") -> Scan:
    name = f"{dataset}{number}{modality}"
    return Scan(Path(f"{name}.nii.gz"), Path("x"), dataset, modality, "box", name, "train")


def test_weights_of_cases():
    scans = [scan("large", n) for n in range(9)] + [scan("small", 0, "T2")]
    np.testing.assert_allclose(case_probabilities(scans, "uniform"), 0.1)
    balanced = case_probabilities(scans, "modality")
    assert balanced[:9].sum() == pytest.approx(0.5)
    for weighting in ("dataset-sqrt", "task-sqrt"):
        p = case_probabilities(scans, weighting)
        assert p.sum() == pytest.approx(1)
        assert p[:9].sum() / p[9] == pytest.approx(3)  # the root of 9 against 1


def test_the_papers_shares_under_square_root_sampling():
    """Of its 4,132 training images, by data set: 50.3, 18.2, 11.0, 9.5, 6.0, 4.9 %."""
    sizes = {"BraTS": 3336, "ATLAS": 436, "OASIS": 160, "ISLES": 120, "WMH": 48, "MSSEG": 32}
    scans = [scan(name, n) for name, count in sizes.items() for n in range(count)]
    p = case_probabilities(scans, "dataset-sqrt")
    shares = Counter()
    for each, probability in zip(scans, p, strict=True):
        shares[each.dataset] += 100 * probability
    assert [round(shares[name], 1) for name in sizes] == [50.3, 18.2, 11.0, 9.5, 6.0, 4.9]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Scan]]:
    folder = tmp_path_factory.mktemp("cases")
    scans = []
    for number in range(3):
        rng = np.random.default_rng(number)
        lesion = np.zeros(SHAPE, np.uint8)
        lesion[4 + number : 9, 5:12, 6:9] = 1
        image = rng.normal(size=SHAPE).astype(np.float32) + 3 * lesion
        paths = [folder / f"{number}{end}.nii.gz" for end in ("", "_label")]
        write_nifti(Volume(image, np.eye(4)), paths[0])
        write_nifti(Volume(lesion, np.eye(4)), paths[1])
        scans.append(Scan(*paths, "Made", "FLAIR", "box", str(number), "train"))
    build_cache(scans, folder / "cache")
    return folder / "cache", scans


@pytest.mark.parametrize("augment", [False, True])
def test_a_patch_is_a_function_of_step_and_number(cached, augment):
    cache, scans = cached
    options = SamplingOptions((8, 8, 8), 2, seed=1, stream=5, augment=augment)
    first, again = (scan_source(cache, scans, options) for _ in range(2))
    torch.manual_seed(1)
    a = [first(step, number) for step in range(3) for number in range(2)]
    torch.manual_seed(2)
    b = [again(step, number) for step in (2, 1, 0) for number in (1, 0)][::-1]
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.lesion, other.lesion)
        assert one.image.shape == (1, 8, 8, 8)
    assert not torch.equal(a[0].image, a[2].image)
    batch = batch_of(first, 0, range(2))
    assert batch.images.shape == (2, 1, 8, 8, 8)
    assert batch.origins[0].task == "Made FLAIR"


def test_streams_of_a_seed_differ(cached):
    cache, scans = cached
    other = SamplingOptions((8, 8, 8), 2, seed=1, stream=6)
    pairs = [scan_source(cache, scans, each)(0, 0).image for each in (OPTIONS, other)]
    assert not torch.equal(*pairs)


def test_every_second_patch_of_a_batch_of_two_shows_the_lesion(cached):
    cache, scans = cached
    source = scan_source(cache, scans, OPTIONS)
    for step in range(10):
        assert source(step, 1).lesion[4, 4, 4] == 1 or source(step, 1).lesion.any()
