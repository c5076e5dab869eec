"""prepare() and restore(): what is left stays left, and going back undoes going there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import GeometryError, InputError
from mome_sdk.preprocess.pipeline import Prepared, prepare, restore
from mome_sdk.volume import Grid, Volume
from phantom import ORIENTATIONS, grid, phantom


def probabilities(*foreground: np.ndarray) -> np.ndarray:
    """(N, D, H, W) of the maps of classes 1 and up."""
    return np.stack([1.0 - np.sum(foreground, axis=0), *foreground]).astype(np.float32)


def small(axes: str = "RAS", shape: tuple[int, int, int] = (20, 24, 28)) -> Volume:
    """1 mm voxels, every one another value."""
    array = np.random.default_rng(0).normal(size=shape)
    array[:2] = 0.0
    return Volume(array, np.eye(4)).reorient(axes)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_model_space_only_turns_the_axes(axes: str, tiny_bundle: ModelBundle) -> None:
    source = small(axes)
    prepared = prepare(source, tiny_bundle, "model")
    assert prepared.volume.grid.axes == tiny_bundle.axes == "SAR"
    turned = source.reorient("SAR").array.astype(np.float64)
    expected = (turned - turned.mean()) / turned.std()
    np.testing.assert_allclose(prepared.volume.array, expected, atol=1e-5)
    np.testing.assert_array_equal(prepared.brain, turned != 0.0)

    found = source.reorient("SAR").array > 1.0
    mask, probability = restore(probabilities(found.astype(float)), prepared)
    np.testing.assert_array_equal(mask, source.array > 1.0)
    np.testing.assert_array_equal(probability, (source.array > 1.0).astype(np.float32))


@given(
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.integers(2, 6)] * 3),
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
)
def test_restore_undoes_the_turning_bit_by_bit(
    axes: str, shape: tuple[int, int, int], seed: int, classes: int
) -> None:
    random = np.random.default_rng(seed)
    source = Volume(random.random(shape), np.diag((1.0, 1.0, 1.0, 1.0))).reorient(axes)
    there = source.reorient("SAR")
    prepared = Prepared(there, source.grid, np.ones(there.array.shape, bool))
    raw = random.dirichlet(np.ones(classes + 1), there.array.shape).astype(np.float32)
    given_ = np.moveaxis(raw, -1, 0)
    mask, probability = restore(given_, prepared)
    best = Volume(given_.argmax(axis=0).astype(np.uint8), there.affine).reorient(axes)
    # A class wins against 1 - (sum of the others); rounding may turn a tie within 1e-6.
    clear = np.sort(given_, axis=0)
    clear = Volume((clear[-1] - clear[-2] > 1e-6).astype(np.uint8), there.affine).reorient(axes)
    np.testing.assert_array_equal(mask[clear.array > 0], best.array[clear.array > 0])
    expected = Volume(given_[1:].sum(axis=0), there.affine).reorient(axes).array
    np.testing.assert_allclose(probability, expected, atol=1e-6)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("spacing_mm", [2.0, 4.0])
def test_mni_space_goes_there_and_back(
    axes: str, spacing_mm: float, tiny_bundle: ModelBundle
) -> None:
    """The image itself as probability comes back as it was, but for what two resamplings blur."""
    source = phantom(where=grid(spacing_mm)).reorient(axes)
    prepared = prepare(source, tiny_bundle, "mni")
    assert prepared.volume.grid.matches(tiny_bundle.grid.reorient("SAR"))
    there = source.resample(prepared.volume.grid).array
    mask, probability = restore(probabilities((there > 250).astype(float)), prepared)
    assert mask.shape == probability.shape == source.array.shape
    different = np.count_nonzero((mask > 0) != (source.array > 250))
    # The surface of the ball moves by less than half a model voxel.
    assert different <= 0.1 * np.count_nonzero(source.array > 250)


def test_the_model_grid_itself_comes_back_bit_by_bit(tiny_bundle: ModelBundle) -> None:
    source = phantom(where=tiny_bundle.grid)
    prepared = prepare(source, tiny_bundle, "mni")
    random = np.random.default_rng(0).random(prepared.volume.array.shape)
    mask, probability = restore(probabilities(random), prepared)
    expected = random.astype(np.float32).transpose(2, 1, 0)
    np.testing.assert_array_equal(probability, expected)
    np.testing.assert_array_equal(mask, expected > 0.5)


def test_outside_the_model_grid_there_is_no_lesion(tiny_bundle: ModelBundle) -> None:
    affine = np.diag((4.0, 4.0, 4.0, 1.0))
    affine[:3, 3] = (-160.0, -160.0, -160.0)
    source = phantom(where=Grid((80, 80, 80), affine))
    prepared = prepare(source, tiny_bundle, "mni")
    mask, _ = restore(probabilities(np.ones(prepared.volume.array.shape)), prepared)
    centres = source.grid.to_mm(np.argwhere(mask > 0))
    index = tiny_bundle.grid.to_index(centres)
    assert (index >= -0.5).all()
    assert (index <= np.array(tiny_bundle.grid.shape) - 0.5).all()
    assert mask.any()


def test_beyond_the_image_its_own_background_goes_on(tiny_bundle: ModelBundle) -> None:
    inner = phantom(where=grid(4.0))
    raised = Volume(inner.array - 50.0, inner.affine)
    np.testing.assert_allclose(
        prepare(raised, tiny_bundle, "mni").volume.array,
        prepare(inner, tiny_bundle, "mni").volume.array,
        atol=1e-4,
    )


def test_the_brain_is_the_templates_in_mni_space(tiny_bundle: ModelBundle) -> None:
    prepared = prepare(phantom(), tiny_bundle, "mni")
    template = tiny_bundle.brain_mask
    assert np.count_nonzero(prepared.brain) == np.count_nonzero(template.array)


@settings(max_examples=20)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(2, 4), st.integers(0, 99))
def test_the_most_probable_class_wins(shape: tuple[int, int, int], classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    raw = np.moveaxis(random.dirichlet(np.ones(classes), shape), -1, 0).astype(np.float32)
    here = Volume(np.zeros(shape), np.eye(4)).reorient("SAR")
    raw = raw.reshape(classes, *here.array.shape)
    mask, _ = restore(raw, Prepared(here, here.grid, np.ones(here.array.shape, bool)))
    margin = np.sort(raw, axis=0)[-1] - np.sort(raw, axis=0)[-2]
    np.testing.assert_array_equal(mask[margin > 1e-6], raw.argmax(axis=0)[margin > 1e-6])


@pytest.mark.parametrize(
    ("affine", "text"),
    [
        (np.diag((1.0, 1.002, 1.0, 1.0)), "1 x 1.002 x 1 mm"),
        (np.diag((2.0, 2.0, 2.0, 1.0)), "2 x 2 x 2 mm"),
        (
            [[0.996, -0.087, 0, 0], [0.087, 0.996, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            "5.0 degrees off",
        ),
    ],
)
def test_another_grid_is_not_the_models(
    affine: object, text: str, tiny_bundle: ModelBundle
) -> None:
    with pytest.raises(GeometryError, match=text) as refusal:
        prepare(Volume(small().array, affine), tiny_bundle, "model")  # type: ignore[arg-type]
    assert refusal.value.code == "geometry.not-model-grid"


def test_a_header_rounded_to_float32_is_the_models_grid(tiny_bundle: ModelBundle) -> None:
    affine = np.diag((0.9999, 1.0, 1.0004, 1.0))
    affine[0, 1] = 1e-3
    assert prepare(Volume(small().array, affine), tiny_bundle, "model").source.shape == (20, 24, 28)


def test_an_image_in_another_space_is_not_mni(tiny_bundle: ModelBundle) -> None:
    volume = phantom()
    moved = np.array(volume.affine)
    moved[:3, 3] += (110.0, 130.0, 100.0)
    with pytest.raises(GeometryError, match="register the image to MNI152") as refusal:
        prepare(Volume(volume.array, moved), tiny_bundle, "mni")
    assert refusal.value.code == "geometry.not-mni"
    assert "% of the head lie in the model's grid" in str(refusal.value)


def test_noise_in_a_large_field_of_view_is_no_head(tiny_bundle: ModelBundle) -> None:
    affine = np.diag((4.0, 4.0, 4.0, 1.0))
    affine[:3, 3] = (-160.0, -160.0, -160.0)
    head = phantom(where=Grid((80, 80, 80), affine))
    noise = np.abs(np.random.default_rng(0).normal(0.0, 5.0, head.array.shape))
    prepared = prepare(Volume(head.array + noise, affine), tiny_bundle, "mni")
    assert prepared.source.matches(head.grid)


@pytest.mark.parametrize("space", ["mni", "model"])
def test_a_single_slice_is_no_volume(space: str, tiny_bundle: ModelBundle) -> None:
    volume = small().crop((0, 0, 3), (20, 24, 1))
    with pytest.raises(InputError, match="single slice") as refusal:
        prepare(volume, tiny_bundle, space)  # type: ignore[arg-type]
    assert refusal.value.code == "volume.not-3d"
