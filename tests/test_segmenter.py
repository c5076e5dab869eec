"""Segmenter: image in, segmentation on the same grid out."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mome_sdk import segmenter as segmenter_module
from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import EngineError, InputError, MomeError
from mome_sdk.segmenter import Segmenter
from mome_sdk.volume import Grid, Volume
from phantom import ORIENTATIONS, BrightEngine, phantom

LESION_MM = (-9.0, 7.0, 4.0)  # left, frontal, high


def head(axes: str = "RAS") -> Volume:
    """40 x 44 x 36 voxels of 1 mm, with an off-centre lesion of 4 mm radius."""
    affine = np.eye(4)
    affine[:3, 3] = (-20.0, -22.0, -18.0)
    where = Grid((40, 44, 36), affine)
    places_mm = where.to_mm(np.stack(np.indices(where.shape), axis=-1))
    array = np.where(np.linalg.norm(places_mm, axis=-1) < 17.0, 100.0, 0.0)
    array[np.linalg.norm(places_mm - LESION_MM, axis=-1) <= 4.0] = 400.0
    return Volume(array, affine).reorient(axes)


def corner() -> Volume:
    """18 x 20 x 17 voxels of it: two windows along each axis."""
    return head().crop((4, 20, 16), (18, 20, 17))


@pytest.fixture
def bright(tiny_bundle: ModelBundle) -> Segmenter:
    return Segmenter(tiny_bundle, BrightEngine(), space="model")


@pytest.fixture(scope="module")
def tiny(tiny_bundle: ModelBundle) -> Iterator[Segmenter]:
    with Segmenter(tiny_bundle, "onnxruntime", space="model") as segmenter:
        yield segmenter


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_lesion_stays_on_its_side_on_the_model_grid(axes: str, bright: Segmenter) -> None:
    source = head(axes)
    result = bright.predict(source)
    np.testing.assert_array_equal(result.affine, source.affine)
    np.testing.assert_array_equal(result.mask, source.array > 200)
    (lesion,) = result.lesions
    np.testing.assert_allclose(lesion.centroid_mm, LESION_MM, atol=1e-9)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIR", "IAL"])
def test_lesion_stays_on_its_side_whatever_the_axes(axes: str, bright_segmenter: Segmenter) -> None:
    source = phantom(lesion_mm=(-32.0, 20.0, 14.0)).reorient(axes)  # left, frontal, high
    result = bright_segmenter.predict(source)
    np.testing.assert_array_equal(result.affine, source.affine)
    assert result.mask.shape == source.array.shape
    (lesion,) = result.lesions
    # 0.87 mm: half the diagonal of a 1 mm voxel; probabilities are resampled linearly, once.
    np.testing.assert_allclose(lesion.centroid_mm, (-32.0, 20.0, 14.0), atol=0.87)


def test_every_kind_of_image_gives_the_same_result(bright: Segmenter, tmp_path: Path) -> None:
    volume = head("LPS")
    image = nib.Nifti1Image(volume.array, volume.affine)
    image.to_filename(tmp_path / "scan.nii.gz")
    expected = bright.predict(volume).mask
    assert expected.any()
    for same in (
        image,
        nib.Nifti2Image(volume.array, volume.affine),
        nib.MGHImage(volume.array, volume.affine),
        tmp_path / "scan.nii.gz",
        str(tmp_path / "scan.nii.gz"),
        (volume.array, volume.affine),
        (volume.array.astype(np.int16), volume.affine.tolist()),
    ):
        result = bright.predict(same)
        np.testing.assert_array_equal(result.mask, expected)
        np.testing.assert_allclose(result.affine, volume.affine, atol=1e-6)


@pytest.mark.parametrize("wrong", [None, 3, np.zeros((3, 3, 3)), (np.zeros((3, 3, 3)),), b"a.nii"])
def test_what_is_no_image_is_refused(wrong: Any, bright: Segmenter) -> None:
    with pytest.raises(InputError, match=f"is a {type(wrong).__name__}") as refusal:
        bright.predict(wrong)
    assert refusal.value.code == "argument.image"


def test_a_mask_of_a_file_keeps_the_header(bright: Segmenter, tmp_path: Path) -> None:
    volume = head("LPS")
    image = nib.Nifti1Image(volume.array, volume.affine)
    image.set_qform(volume.affine, code=1)
    image.set_sform(volume.affine, code=4)
    image.to_filename(tmp_path / "scan.nii.gz")
    bright.predict(tmp_path / "scan.nii.gz").save(tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (1, 4)
    np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-6)
    assert b"tiny" in mask.header["descrip"].item()


def test_the_probability_and_the_mask_agree(bright: Segmenter) -> None:
    result = bright.predict(head())
    assert result.probability is not None
    assert result.probability.dtype == np.float32
    np.testing.assert_array_equal(result.mask, result.probability > 0.5)


def test_provenance_and_timings_name_everything(tiny_bundle: ModelBundle) -> None:
    segmenter = Segmenter(
        tiny_bundle, BrightEngine(), space="model", mirror="all", step=0.75, batch=2, threads=1
    )
    result = segmenter.predict(head())
    made = result.provenance
    assert made["bundle_sha256"] == tiny_bundle.sha256
    assert {k: made[k] for k in ("engine", "device", "precision", "space", "mirror", "step")} == {
        "engine": "bright",
        "device": "cpu",
        "precision": "fp32",
        "space": "model",
        "mirror": "all",
        "step": 0.75,
    }
    assert {k: made[k] for k in ("blend", "batch", "threads", "patch", "windows")} == {
        "blend": "exact",
        "batch": 2,
        "threads": 1,
        "patch": [16, 16, 16],
        "windows": 3 * 4 * 3,
    }
    assert list(result.timings) == ["read", "prepare", "network", "restore"]
    assert all(seconds >= 0.0 for seconds in result.timings.values())


def test_shares_sum_to_one(bright: Segmenter, tiny: Segmenter) -> None:
    assert bright.predict(head()).expert_share is None
    share = bright.predict(head(), shares=True).expert_share
    assert share is not None
    assert list(share) == ["T1", "T1ce", "T2", "FLAIR", "DWI"]
    for region in ("lesion", "brain"):
        # Expert e of the bright engine has share (e + 1) / 15.
        found = [share[modality][region] for modality in share]
        np.testing.assert_allclose(found, np.arange(1, 6) / 15, atol=1e-6)
    real = tiny.predict(corner(), shares=True).expert_share
    assert real is not None
    assert sum(part["brain"] or 0.0 for part in real.values()) == pytest.approx(1.0)


def test_without_lesion_its_share_is_none(tiny_bundle: ModelBundle) -> None:
    segmenter = Segmenter(tiny_bundle, BrightEngine(threshold=99.0), space="model")
    result = segmenter.predict(head(), shares=True)
    assert result.lesions == ()
    assert result.expert_share is not None
    assert result.expert_share["T1"] == {"lesion": None, "brain": pytest.approx(1 / 15)}


def test_shares_do_not_change_the_result(tiny: Segmenter) -> None:
    plain, shared = tiny.predict(corner()), tiny.predict(corner(), shares=True)
    np.testing.assert_array_equal(plain.probability, shared.probability)


def test_progress_counts_to_the_end(bright: Segmenter) -> None:
    seen: list[tuple[int, int]] = []
    result = bright.predict(head(), lambda done, total: seen.append((done, total)))
    total = result.provenance["windows"]
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_progress_cancels(error: type[BaseException], bright: Segmenter) -> None:
    calls = []

    def stop(done: int, _: int) -> None:
        calls.append(done)
        raise error

    with pytest.raises(error):
        bright.predict(head(), stop)
    assert len(calls) == 1


def test_logits_are_those_of_the_windows(bright: Segmenter) -> None:
    x = np.random.default_rng(0).normal(size=(1, 20, 18, 30)).astype(np.float32)
    logits = bright.logits(x)
    assert logits.shape == (2, 20, 18, 30)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[1], 4.0 * (x[0] - 3.0), atol=1e-4)


@pytest.mark.parametrize(
    ("x", "code", "text"),
    [
        (np.zeros((20, 18, 30)), "argument.image", r"\(1, D, H, W\) is expected"),
        (np.zeros((2, 20, 18, 30)), "argument.image", r"\(2, 20, 18, 30\)"),
        (np.full((1, 2, 2, 2), np.nan), "volume.not-finite", "NaN"),
    ],
)
def test_logits_of_another_array_are_refused(
    x: np.ndarray, code: str, text: str, bright: Segmenter
) -> None:
    with pytest.raises(InputError, match=text) as refusal:
        bright.logits(x)
    assert refusal.value.code == code


def test_mirroring_averages_eight_copies(tiny_bundle: ModelBundle, tiny: Segmenter) -> None:
    x = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    with Segmenter(tiny_bundle, "onnxruntime", space="model", mirror="all") as mirrored:
        found = mirrored.logits(x)
    copies = []
    for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
        copies.append(np.flip(tiny.logits(np.flip(x, axes)), axes))
    # 1e-5 of logits of size 1: float32 sums in another order.
    np.testing.assert_allclose(found, np.mean(copies, axis=0), atol=1e-5)


def test_eight_threads_share_one_segmenter(tiny: Segmenter) -> None:
    volumes = [corner().reorient(axes) for axes in ORIENTATIONS[:8]]
    alone = [tiny.predict(volume).probability for volume in volumes]
    barrier = threading.Barrier(8)

    def together(volume: Volume) -> Any:
        barrier.wait()
        return tiny.predict(volume).probability

    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(together, volumes), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_closing_ends_it(tiny_bundle: ModelBundle) -> None:
    with Segmenter(tiny_bundle, "onnxruntime", space="model") as segmenter:
        assert segmenter.predict(corner()).mask.shape == (18, 20, 17)
    segmenter.close()
    with pytest.raises(EngineError, match="is closed") as refusal:
        segmenter.predict(corner())
    assert refusal.value.code == "engine.closed"


def test_an_engine_of_ones_own_is_left_open(tiny_bundle: ModelBundle) -> None:
    engine = BrightEngine()
    Segmenter(tiny_bundle, engine).close()
    assert not engine.closed


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"space": "talairach"}, "argument.space", "one of: native, mni, model"),
        ({"mirror": "some"}, "argument.mirror", "one of: none, all"),
        ({"step": 0.0}, "argument.step", "step"),
        ({"step": 1.5}, "argument.step", "step"),
        ({"blend": "smooth"}, "argument.blend", "blend"),
        ({"batch": 0}, "argument.batch", "batch"),
        ({"threads": 0}, "argument.threads", "threads"),
        ({"engine": "abacus"}, "argument.engine", "abacus"),
        ({"engine": BrightEngine(), "device": "cuda:0"}, "engine.conflict", "cuda:0"),
        ({"engine": BrightEngine(), "precision": "bf16"}, "engine.conflict", "bf16"),
        ({"engine": "onnxruntime", "device": "cuda:0"}, "engine.device", "cuda:0"),
        ({"engine": "onnxruntime", "precision": "fp8"}, "engine.precision", "fp8"),
        ({"model": "nowhere"}, "bundle.not-found", "nowhere"),
    ],
)
def test_options_are_never_replaced(
    options: dict[str, Any], code: str, text: str, tiny_bundle: ModelBundle
) -> None:
    with pytest.raises(MomeError, match=text) as refusal:
        Segmenter(**{"model": tiny_bundle, **options})
    assert refusal.value.code == code


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch"])
def test_every_engine_finds_the_same(
    engine: str, tiny_bundle: ModelBundle, tiny: Segmenter
) -> None:
    prepared = np.random.default_rng(0).normal(size=(1, 17, 16, 20)).astype(np.float32)
    expected = tiny.logits(prepared)
    with Segmenter(tiny_bundle.path, engine, space="model", threads=1) as segmenter:
        found = segmenter.logits(prepared)
        result = segmenter.predict(corner(), shares=True)
    # float32 sums in another order.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))
    assert result.provenance["engine"] == engine
    assert result.expert_share is not None


def broken() -> Volume:
    return Volume(np.full((18, 20, 17), np.nan), np.eye(4))


def test_a_batch_gives_what_single_calls_give_and_names_what_is_broken(bright: Segmenter) -> None:
    volumes = [head(), broken(), "nowhere.nii.gz", corner()]
    cases = list(bright.predict_batch(volumes, shares=True))
    assert [case.input for case in cases] == volumes
    codes = [case.error.code if case.error else None for case in cases]
    assert codes == [None, "volume.not-finite", "volume.missing", None]
    for case in (cases[0], cases[3]):
        alone = bright.predict(case.input, shares=True)
        assert case.segmentation is not None
        np.testing.assert_array_equal(case.segmentation.probability, alone.probability)
        assert case.segmentation.expert_share == alone.expert_share
        assert list(case.segmentation.timings) == ["read", "prepare", "network", "restore"]
    assert cases[1].segmentation is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_batch_of_any_length_ends(count: int, bright: Segmenter) -> None:
    assert len(list(bright.predict_batch([corner()] * count))) == count


def test_a_batch_takes_one_image_ahead_and_no_more(bright: Segmenter) -> None:
    taken = []

    def volumes() -> Iterator[Volume]:
        for number in range(5):
            taken.append(number)
            yield corner()

    cases = bright.predict_batch(volumes())
    assert taken == []
    for done in range(5):
        next(cases)
        assert len(taken) == min(done + 2, 5)


def test_the_next_image_is_prepared_while_the_network_works(
    tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = threading.Semaphore(0)
    prepare = segmenter_module.prepare

    def counted(*arguments: Any, **options: Any) -> Any:
        ready = prepare(*arguments, **options)
        prepared.release()
        return ready

    class Patient(BrightEngine):
        """Waits in its first call until a second image is prepared."""

        waited = False

        def run(self, *arguments: Any, **options: Any) -> None:
            if not self.waited:
                self.waited = prepared.acquire(timeout=20) and prepared.acquire(timeout=20)
                assert self.waited, "the second image was not prepared meanwhile"
            super().run(*arguments, **options)

    monkeypatch.setattr(segmenter_module, "prepare", counted)
    engine = Patient()
    segmenter = Segmenter(tiny_bundle, engine, space="model")
    assert all(case.segmentation for case in segmenter.predict_batch([corner(), corner()]))
    assert engine.waited


def test_a_defect_ends_a_batch(bright: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(segmenter_module, "restore", fail)
    with pytest.raises(ZeroDivisionError):
        list(bright.predict_batch([corner()] * 3))
    assert reading_threads() == []


def test_too_little_memory_for_one_image_is_its_error(
    bright: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = segmenter_module.prepare

    def starved(volume: Volume, *arguments: Any, **options: Any) -> Any:
        if volume.array.shape == head().array.shape:
            raise MemoryError("72 GiB")
        return prepare(volume, *arguments, **options)

    monkeypatch.setattr(segmenter_module, "prepare", starved)
    large, small = bright.predict_batch([head(), corner()])
    assert large.error is not None
    assert large.error.code == "engine.out-of-memory"
    assert small.segmentation is not None


def test_closing_a_batch_leaves_no_thread(bright: Segmenter) -> None:
    cases = bright.predict_batch(corner() for _ in range(1000))
    next(cases)
    cases.close()
    assert reading_threads() == []


def test_an_error_of_a_batch_keeps_no_array(
    bright: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def refuse(_: Any, prepared: Any) -> None:
        alive.add(prepared)
        try:
            raise OSError
        except OSError as error:
            raise InputError("volume.test", "No.") from error

    monkeypatch.setattr(segmenter_module, "restore", refuse)
    cases = list(bright.predict_batch([corner()] * 3))
    assert all(case.error for case in cases)
    gc.collect()
    assert len(alive) == 0


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "mome-prepare" in thread.name]


def test_a_brain_mask_beside_a_reference_is_not_ignored(whole_head_bundle: ModelBundle) -> None:
    segmenter = Segmenter(whole_head_bundle, BrightEngine())
    template = whole_head_bundle.template
    reference = segmenter.align(template)
    with pytest.raises(InputError, match="together with a reference") as caught:
        segmenter.predict(template, reference=reference, brain_mask=whole_head_bundle.brain_mask)
    assert caught.value.code == "argument.brain-mask"
