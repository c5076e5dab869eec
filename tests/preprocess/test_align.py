"""align(): a scan finds its place, or is refused with a figure; nothing in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import EngineError, InputError, PreparationError
from mome_sdk.nifti import read_nifti
from mome_sdk.preprocess import register, skull_strip
from mome_sdk.preprocess.align import Alignment, align, align_to
from mome_sdk.preprocess.pipeline import prepare, restore
from mome_sdk.preprocess.quality import centre_mm, judge
from mome_sdk.volume import Grid, Volume
from preprocess.truth import run_case

QUICK_CASES = range(12)


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.load("demo")


@pytest.fixture(scope="module")
def at_rest(bundle: ModelBundle) -> Alignment:
    """Of a scan that lies on the template."""
    return align(bundle.template, bundle)


def in_a_skull(bundle: ModelBundle) -> Volume:
    """The template with something bright in half of the voxels around its brain."""
    array = np.array(bundle.template.array)
    skull = np.random.default_rng(0).random(array.shape) < 0.5
    array[skull & (bundle.brain_mask.array == 0)] = 200
    return Volume(array, bundle.template.affine)


def refusal(scan: Volume, bundle: ModelBundle) -> PreparationError:
    with pytest.raises(PreparationError) as caught:
        align(scan, bundle)
    return caught.value


@pytest.mark.parametrize("number", QUICK_CASES)
def test_a_lesion_comes_back_to_where_it_is(
    number: int, bundle: ModelBundle, data_dir: Path
) -> None:
    """12 of the 100 cases of `python -m tests.preprocess.truth`; none of these 12 is refused."""
    outcome = run_case(number, bundle, data_dir)
    assert outcome.refused == ""
    assert outcome.is_right, outcome
    assert not outcome.is_lost, outcome


def test_a_brain_on_the_template_is_not_registered_again(
    bundle: ModelBundle, at_rest: Alignment
) -> None:
    np.testing.assert_array_equal(at_rest.to_template, np.eye(4))
    assert at_rest.method == "none: in the template's space already"
    assert at_rest.brain_from == "image"
    prepared = prepare(bundle.template, bundle, "native", alignment=at_rest)
    assert prepared.volume.grid.matches(bundle.grid.reorient(bundle.axes))


@pytest.mark.parametrize(("spacing_mm", "least"), [((1, 1, 1), 0.98), ((1, 1, 5), 0.93)])
def test_the_brain_mask_survives_the_way_there_and_back(
    spacing_mm: tuple[int, int, int], least: float, bundle: ModelBundle
) -> None:
    """Without a network: the template's brain, sampled by an oblique scanner, forth and back."""
    turn = np.eye(4)
    turn[1:3, 1:3] = ((np.cos(0.3), -np.sin(0.3)), (np.sin(0.3), np.cos(0.3)))
    affine = turn @ np.diag((*spacing_mm, 1.0))
    shape = [round(length) for length in 260 / np.array(spacing_mm)]
    affine[:3, 3] = -(affine[:3, :3] @ (np.array(shape) / 2)) + (0.0, -20.0, 8.0)
    grid = Grid((shape[0], shape[1], shape[2]), affine)
    source = bundle.brain_mask.resample(grid, mode="nearest")
    alignment = Alignment(np.eye(4), source, "test", "file", judge(source, np.eye(4), bundle))
    prepared = prepare(source, bundle, "native", alignment=alignment)
    there = source.resample(prepared.volume.grid, mode="linear")
    brain = np.asarray(there.array, np.float32)
    mask, _ = restore(np.stack((1 - brain, brain)), prepared)
    known = source.array != 0
    dice = 2 * np.count_nonzero((mask > 0) & known) / (np.count_nonzero(mask) + known.sum())
    assert dice >= least


@pytest.mark.parametrize(
    ("how", "flip", "code"),
    [
        ("upside down", (1, 1, -1), "registration.turned"),
        ("front to back", (1, -1, 1), "registration.turned"),
        ("upside down and front to back", (1, -1, -1), "registration.turned"),
        ("mirrored left to right, which nobody can see", (-1, 1, 1), None),
    ],
)
def test_a_turned_header_shows_in_the_figures(
    how: str, flip: tuple[int, int, int], code: str | None, bundle: ModelBundle
) -> None:
    """Without registration: the template turned about the middle of its brain."""
    middle = np.array((0.0, -17.0, 6.0))
    turned = np.diag((*flip, 1.0)).astype(float)
    turned[:3, 3] = middle - turned[:3, :3] @ middle
    scan = Volume(bundle.template.array, turned @ bundle.template.affine)
    problems = judge(scan, np.eye(4), bundle).problems()
    if code is None:
        assert problems == ()
    else:
        assert code in {problem.code for problem in problems}
        assert any(how in problem.message for problem in problems)


def test_what_is_no_brain_is_named(bundle: ModelBundle) -> None:
    noise = np.random.default_rng(0).normal(size=(60, 60, 60)).astype(np.float32)
    affine = np.diag((3.0, 3.0, 3.0, 1.0))
    affine[:3, 3] = (-90.0, -110.0, -80.0)
    (problem,) = judge(Volume(noise, affine), np.eye(4), bundle).problems()
    assert problem.code == "brain.not-found"


def test_thick_slices_are_refused_before_any_work(bundle: ModelBundle) -> None:
    thick = bundle.template.resample(
        Grid((197, 233, 16), bundle.template.affine @ np.diag((1, 1, 12, 1)))
    )
    error = refusal(thick, bundle)
    assert error.code == "brain.too-coarse"
    assert "12.0 mm" in error.message


def test_a_brain_of_impossible_size_is_refused(bundle: ModelBundle) -> None:
    double = np.diag((2.0, 2.0, 2.0, 1.0))
    quality = judge(
        Volume(bundle.template.array, double @ bundle.template.affine),
        np.diag((0.5, 0.5, 0.5, 1)),
        bundle,
    )
    (problem,) = quality.problems()
    assert problem.code == "brain.volume"
    assert f"{8 * 1882.989:.0f} mL" in problem.message


def test_half_a_brain_is_refused_for_what_is_missing(bundle: ModelBundle) -> None:
    front = bundle.template.crop((0, 117, 0), (197, 116, 189))
    codes = {problem.code for problem in judge(front, np.eye(4), bundle).problems()}
    assert "brain.cut" in codes
    array = np.array(bundle.template.array)
    array[:, :117] = 0
    emptied = Volume(array, bundle.template.affine)
    codes = {problem.code for problem in judge(emptied, np.eye(4), bundle).problems()}
    assert "brain.incomplete" in codes


def test_force_goes_on_and_records_itself(bundle: ModelBundle) -> None:
    thick = bundle.template.resample(
        Grid((197, 233, 23), bundle.template.affine @ np.diag((1, 1, 8, 1)))
    )
    forced = align(thick, bundle, force=True)
    assert forced.forced == ("brain.too-coarse",)
    assert forced.as_json()["forced"] == ["brain.too-coarse"]


def test_a_brain_mask_from_a_file_is_what_is_kept(bundle: ModelBundle) -> None:
    """A head is stripped by it: here the template in a skull of bright voxels."""
    head = in_a_skull(bundle)
    found = align(head, bundle, brain_mask=bundle.brain_mask)
    assert found.brain_from == "file"
    prepared = prepare(head, bundle, "native", alignment=found)
    values = prepared.volume.array[~prepared.brain]
    assert (values == values[0]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda mask: mask * 0, "0 everywhere"), (lambda mask: mask[::-1], "outside the scan")],
)
def test_a_brain_mask_that_cannot_be_right_is_named(
    change: object, text: str, bundle: ModelBundle
) -> None:
    affine = np.array(bundle.template.affine)
    if text == "outside the scan":
        affine[0, 3] += 150.0
    mask = Volume(change(bundle.brain_mask.array), affine)  # type: ignore[operator]
    with pytest.raises(InputError, match=text) as caught:
        align(bundle.template, bundle, brain_mask=mask)
    assert caught.value.code == "argument.brain-mask"


def test_another_scan_goes_where_its_reference_is(bundle: ModelBundle, at_rest: Alignment) -> None:
    """A head of the same session takes the registration and the brain of the stripped reference."""
    head = in_a_skull(bundle)
    found = align_to(at_rest, head, bundle, force=False)
    assert found.method == f"reference: {at_rest.method}"
    assert found.brain_from == "reference"
    thick = bundle.template.resample(
        Grid((197, 233, 16), bundle.template.affine @ np.diag((1, 1, 12, 1)))
    )
    with pytest.raises(PreparationError, match=r"12\.0 mm"):
        align_to(at_rest, thick, bundle, force=False)
    moved = np.array(head.affine)
    moved[:3, 3] += 40.0
    with pytest.raises(PreparationError) as caught:
        align_to(at_rest, Volume(head.array, moved), bundle, force=False)
    assert caught.value.code == "brain.not-found"
    assert isinstance(caught.value.attempt, Alignment)


HEADER_MISTAKES = {
    "upside down": (1, 1, -1),
    "front to back": (1, -1, 1),
    "upside down and front to back": (1, -1, -1),
}
SCANS = (
    "ms_patient26/FLAIR.nii.gz",
    "ms_patient19/T2.nii.gz",
    "stroke_case0009/dwi.nii.gz",
    "ms_native_patient12/T1.nii.gz",
)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "scan"), list(zip(HEADER_MISTAKES, SCANS, strict=False)))
def test_a_scan_with_a_turned_header_is_refused(
    how: str, scan: str, bundle: ModelBundle, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With brain extraction in one of them, which takes longer and must not help."""
    if how != "front to back":
        monkeypatch.setattr(skull_strip, "is_installed", lambda: False)
    volume = read_nifti(data_dir / scan)
    affine = np.diag((*HEADER_MISTAKES[how], 1.0)) @ volume.affine
    assert refusal(Volume(volume.array, affine), bundle).code.startswith("registration.")


@pytest.mark.slow
def test_noise_and_a_ball_are_refused(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skull_strip, "is_installed", lambda: False)
    random = np.random.default_rng(0)
    affine = np.diag((2.0, 2.0, 2.0, 1.0))
    affine[:3, 3] = -90.0
    noise = random.gamma(2.0, 50.0, (90, 90, 90))
    places = np.stack(np.indices((90, 90, 90)), axis=-1) - 44.5
    ball = np.where(np.linalg.norm(places, axis=-1) < 40, 100.0 + random.normal(size=(90,) * 3), 0)
    for array in (noise, ball):
        error = refusal(Volume(array, affine), bundle)
        assert error.code in ("brain.not-found", "registration.poor", "registration.turned")


@pytest.mark.slow
def test_half_a_head_and_a_flat_slab_are_refused(
    bundle: ModelBundle, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skull_strip, "is_installed", lambda: False)
    head = read_nifti(data_dir / "ms_native_patient12" / "FLAIR.nii.gz").reorient("RAS")
    i, j, k = head.array.shape
    left = head.crop((0, 0, 0), (i // 2, j, k))
    assert refusal(left, bundle).code.split(".")[0] in ("registration", "brain")
    brain = read_nifti(data_dir / "stroke_case0009" / "adc.nii.gz").reorient("RAS")
    affine = np.diag((3.44, 3.44, 4.0, 1.0))
    middle = brain.grid.to_mm(np.argwhere(brain.array > 0).mean(axis=0))
    affine[:3, 3] = middle - (110.0, 110.0, 40.0)
    slab = brain.resample(Grid((64, 64, 20), affine))
    assert refusal(slab, bundle).code.split(".")[0] in ("registration", "brain")


@pytest.mark.slow
def test_deepbet_finds_the_brain_of_a_head(data_dir: Path) -> None:
    """1,489 to 1,504 mL were measured on this patient's two scans (deepbet 1.0.2)."""
    if not skull_strip.is_installed():
        pytest.skip(f"deepbet is not installed: {skull_strip.INSTALL}")
    head = read_nifti(data_dir / "ms_native_patient12" / "FLAIR.nii.gz")
    brain = skull_strip.find_brain(head)
    ml = np.count_nonzero(brain.array) * brain.grid.voxel_ml
    assert ml == pytest.approx(1489, abs=60)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sitk", "ants"])
def test_other_programs_put_the_brain_in_the_same_place(
    method: register.Method, bundle: ModelBundle, data_dir: Path
) -> None:
    """On voxels of 2 mm, for time."""
    try:
        register.check_installed(method)
    except EngineError as error:
        pytest.skip(str(error))
    brain = read_nifti(data_dir / "stroke_case0009" / "dwi.nii.gz")
    small = bundle.template.resample(_every_2_mm(bundle.template.grid))
    found = next(register.registrations(brain, small, centre_mm(bundle), method=method))
    quality = judge(brain, found, bundle)
    assert quality.problems() == ()
    assert quality.overlap > 0.93


def _every_2_mm(grid: Grid) -> Grid:
    factor = 2.0 / np.array(grid.spacing_mm)
    i, j, k = np.ceil(np.array(grid.shape) / factor).astype(int)
    return Grid((int(i), int(j), int(k)), grid.affine @ np.diag((*factor, 1.0)))
