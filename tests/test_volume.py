"""Grid and Volume: whatever is done to the array, every voxel keeps its place in the patient."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mome_sdk.errors import GeometryError, InputError
from mome_sdk.volume import Grid, Volume
from phantom import ORIENTATIONS

lengths = st.integers(1, 7)
shapes = st.tuples(lengths, lengths, lengths)
axes = st.sampled_from(ORIENTATIONS)


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """A grid in the patient: rotated up to 25 degrees, any axes, spacing 0.3-6 mm, anywhere."""
    angles = np.radians([draw(st.floats(-25.0, 25.0)) for _ in range(3)])
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = (n for n in range(3) if n != axis)
        turn[[i, i, j, j], [i, j, i, j]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        rotation = rotation @ turn
    signs = [draw(st.sampled_from((-1.0, 1.0))) for _ in range(3)]
    spacing = [draw(st.floats(0.3, 6.0)) for _ in range(3)]
    order = draw(st.permutations(range(3)))
    affine = np.eye(4)
    affine[:3, :3] = (rotation * signs * spacing)[:, order]
    affine[:3, 3] = [draw(st.floats(-200.0, 200.0)) for _ in range(3)]
    return affine


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    """Every voxel holds another number."""
    shape = draw(shapes)
    return Volume(np.arange(1.0, np.prod(shape) + 1).reshape(shape), draw(affines()))


def places(volume: Volume) -> dict[float, np.ndarray]:
    """Voxel value -> RAS position in mm, without the padding."""
    indices = np.argwhere(volume.array > 0)
    values = volume.array[tuple(indices.T)]
    return dict(zip(values.tolist(), volume.grid.to_mm(indices), strict=True))


def assert_same_places(after: Volume, before: Volume) -> None:
    known = places(before)
    for value, mm in places(after).items():
        np.testing.assert_allclose(mm, known[value], atol=1e-9)


def test_all_48_orientations_are_there() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("target", ORIENTATIONS)
@pytest.mark.parametrize("origin", ["RAS", "LPI", "SAR", "PIR"])
def test_markers_stay_where_they_are_in_every_orientation(origin: str, target: str) -> None:
    array = np.zeros((5, 6, 7), np.float32)
    array[4, 0, 1] = 1.0
    array[1, 5, 2] = 2.0
    affine = np.diag((2.0, 3.0, 4.0, 1.0))
    affine[:3, 3] = (-4.0, 11.0, 7.0)
    volume = Volume(array, affine).reorient(origin)
    turned = volume.reorient(target)
    assert turned.grid.axes == target
    assert turned.array.size == array.size
    assert_same_places(turned, volume)
    assert len(places(turned)) == 2


def test_axes_are_those_of_nibabel_for_every_orientation() -> None:
    grid = Grid((2, 3, 4), np.diag((1.0, 2.0, 3.0, 1.0)))
    for target in ORIENTATIONS:
        assert "".join(nib.aff2axcodes(grid.reorient(target).affine)) == target


@given(affines())
def test_axes_are_those_of_nibabel_on_tilted_grids(affine: np.ndarray) -> None:
    assert Grid((2, 2, 2), affine).axes == "".join(nib.aff2axcodes(affine))


@given(volumes(), axes)
def test_reorient_keeps_places_and_undoes_itself(volume: Volume, target: str) -> None:
    turned = volume.reorient(target)
    assert turned.grid.axes == target
    assert turned.array.base is not None, "a view, not a copy"
    assert_same_places(turned, volume)
    back = turned.reorient(volume.grid.axes)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@given(volumes(), st.data())
def test_crop_keeps_places(volume: Volume, data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, n - 1)) for n in volume.array.shape)
    shape = tuple(
        data.draw(st.integers(1, n - s)) for n, s in zip(volume.array.shape, start, strict=True)
    )
    box = volume.crop(start, shape)
    assert box.array.shape == shape
    assert_same_places(box, volume)


@given(volumes(), shapes, shapes)
def test_pad_keeps_places_and_crop_undoes_it(volume: Volume, before: tuple, after: tuple) -> None:
    padded = volume.pad(before, after, value=-1.0)
    assert_same_places(padded, volume)
    assert np.count_nonzero(padded.array == -1.0) == padded.array.size - volume.array.size
    back = padded.crop(before, volume.array.shape)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@given(volumes(), axes)
def test_resampling_to_turned_axes_is_reorienting(volume: Volume, target: str) -> None:
    turned = volume.reorient(target)
    for mode in ("linear", "nearest"):
        resampled = volume.resample(turned.grid, mode=mode)
        # 1e-3: weights of linear interpolation at a place that is a voxel centre up to rounding,
        # for values up to 343.
        np.testing.assert_allclose(resampled.array, turned.array, atol=1e-3)


@given(affines(), affines())
def test_resampling_keeps_a_linear_field(here: np.ndarray, there: np.ndarray) -> None:
    """Linear interpolation is exact for a field that is linear in millimetres."""
    source, target = Grid((9, 10, 11), here), Grid((4, 5, 6), there)
    field = source.to_mm(np.stack(np.indices(source.shape), axis=-1)) @ (0.3, -0.2, 0.5)
    resampled = Volume(field, here).resample(target)
    places_mm = target.to_mm(np.stack(np.indices(target.shape), axis=-1))
    index = source.to_index(places_mm)
    inside = ((index >= 0) & (index <= np.array(source.shape) - 1)).all(axis=-1)
    expected = places_mm @ (0.3, -0.2, 0.5)
    np.testing.assert_allclose(resampled.array[inside], expected[inside], atol=1e-3)


@given(affines(), st.tuples(*[st.floats(-50.0, 50.0)] * 3))
def test_index_and_mm_undo_each_other(affine: np.ndarray, index: tuple) -> None:
    grid = Grid((3, 3, 3), affine)
    np.testing.assert_allclose(grid.to_index(grid.to_mm(index)), index, atol=1e-8)


def test_masks_stay_masks() -> None:
    mask = Volume(np.ones((2, 3, 4), np.uint8), np.eye(4))
    assert mask.reorient("SAR").array.dtype == np.uint8
    assert mask.resample(mask.grid, mode="nearest").array.dtype == np.uint8
    assert Volume(np.ones((2, 3, 4), bool), np.eye(4)).array.dtype == np.uint8
    assert Volume(np.ones((2, 3, 4), np.int16), np.eye(4)).array.dtype == np.float32


def test_nothing_can_be_changed() -> None:
    volume = Volume(np.zeros((2, 3, 4)), np.eye(4))
    for array in (volume.array, volume.affine, volume.grid.affine):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    with pytest.raises(AttributeError):
        volume.array = np.ones((2, 3, 4))  # type: ignore[misc]


def test_a_writeable_affine_is_copied() -> None:
    affine = np.eye(4)
    volume = Volume(np.zeros((2, 3, 4)), affine)
    affine[0, 3] = 99.0
    assert volume.affine[0, 3] == 0.0


def test_sizes_and_tilt() -> None:
    affine = np.diag((2.0, 3.0, 0.5, 1.0))
    grid = Grid((2, 2, 2), affine)
    assert grid.spacing_mm == (2.0, 3.0, 0.5)
    assert grid.voxel_ml == pytest.approx(0.003)
    assert grid.tilt == 0.0
    angle = np.radians(5.0)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert Grid((2, 2, 2), turn @ affine).tilt == pytest.approx(np.sin(angle))


@pytest.mark.parametrize(
    ("affine", "code", "text"),
    [
        (np.diag((1.0, 0.0, 1.0, 1.0)), "geometry.singular-affine", "no volume"),
        (np.ones((4, 4)), "geometry.affine", "last row 0 0 0 1"),
        (np.eye(3), "geometry.affine", r"shape \(3, 3\)"),
        (np.diag((1.0, np.nan, 1.0, 1.0)), "geometry.affine", "finite"),
        (
            [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            "geometry.singular-affine",
            "lengths",
        ),
    ],
)
def test_an_untrustworthy_affine_is_refused(affine: object, code: str, text: str) -> None:
    with pytest.raises(GeometryError, match=text) as refusal:
        Volume(np.zeros((2, 2, 2)), affine)  # type: ignore[arg-type]
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("array", "code", "text"),
    [
        (np.zeros((4, 5)), "volume.not-3d", r"\(4, 5\)"),
        (np.zeros((4, 5, 6, 2)), "volume.not-3d", r"\(4, 5, 6, 2\)"),
        (np.zeros((0, 5, 6)), "volume.not-3d", "at least one voxel"),
        (np.zeros((2, 2, 2), complex), "volume.dtype", "complex128"),
        (np.full((2, 2, 2), "x"), "volume.dtype", "Real numbers"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array: np.ndarray, code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as refusal:
        Volume(array, np.eye(4))
    assert refusal.value.code == code


def test_a_shape_that_is_no_box_is_refused() -> None:
    with pytest.raises(GeometryError, match="three axes") as refusal:
        Grid((3, 0, 3), np.eye(4))
    assert refusal.value.code == "geometry.shape"


@pytest.mark.parametrize(("start", "shape"), [((-1, 0, 0), (1, 1, 1)), ((0, 0, 3), (2, 3, 2))])
def test_a_box_outside_is_refused(start: tuple, shape: tuple) -> None:
    volume = Volume(np.zeros((2, 3, 4)), np.eye(4))
    with pytest.raises(InputError, match="leaves the volume") as refusal:
        volume.crop(start, shape)
    assert refusal.value.code == "volume.crop-outside"


def test_negative_padding_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be negative") as refusal:
        Volume(np.zeros((2, 3, 4)), np.eye(4)).pad((0, -1, 0), (0, 0, 0))
    assert refusal.value.code == "argument.pad"


@pytest.mark.parametrize("wrong", ["", "RA", "RAR", "RLS", "RASA", "ras", "XYZ"])
def test_axes_that_are_no_axes_are_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="three letters") as refusal:
        Volume(np.zeros((2, 3, 4)), np.eye(4)).reorient(wrong)
    assert refusal.value.code == "argument.axes"


def test_grids_match_within_a_tolerance() -> None:
    near = np.eye(4)
    near[0, 3] = 5e-7
    far = np.eye(4)
    far[0, 3] = 1e-3
    grid = Grid((2, 2, 2), np.eye(4))
    assert grid.matches(Grid((2, 2, 2), near))
    assert not grid.matches(Grid((2, 2, 2), far))
    assert grid.matches(Grid((2, 2, 2), far), tolerance=2e-3)
    assert not grid.matches(Grid((2, 2, 3), near))


def test_orientation_of_a_45_degree_tilt_gives_three_different_letters() -> None:
    c = np.sqrt(0.5)
    for signs in itertools.product((1, -1), repeat=2):
        affine = np.eye(4)
        affine[:2, :2] = [[c, signs[0] * -c], [signs[1] * c, signs[0] * signs[1] * c]]
        assert Grid((2, 2, 2), affine).axes in ORIENTATIONS
