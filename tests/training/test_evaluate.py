"""Held-out cases: fixed by the seed, evaluated once, tabulated; written as scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from labelmap import write_labelmap
from mome_sdk import _core
from mome_sdk.errors import InputError
from mome_sdk.nifti import read_nifti
from mome_sdk.segmenter import Segmenter
from mome_sdk.training.__main__ import DEMO_CONFIG, main
from mome_sdk.training.anatomy import Anatomy, load_anatomy
from mome_sdk.training.config import TrainConfig, load_config
from mome_sdk.training.evaluate import (
    THRESHOLDS,
    Row,
    card,
    evaluate,
    held_out_case,
    lesion_free_case,
    real_cases,
    table,
)
from mome_sdk.training.metrics import dice


@pytest.fixture(scope="module")
def labelmaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    for name in ("seg09", "seg10"):
        write_labelmap(folder / f"{name}.nii.gz", (20, 24, 20))
    return folder


@pytest.fixture(scope="module")
def anatomies(labelmaps: Path) -> list[Anatomy]:
    return [load_anatomy(labelmaps / f"seg{n}.nii.gz") for n in ("09", "10")]


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_config(DEMO_CONFIG)


def test_a_case_depends_on_its_number_alone(config, anatomies):
    first, again, other = (held_out_case(config, anatomies, "T2", n) for n in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert first.lesion.any()


def test_fused_dice_is_that_of_a_segmenter_and_a_case_runs_once(
    config, anatomies, tiny_bundle, tmp_path
):
    case = held_out_case(config, anatomies, "FLAIR", 0)
    results = tmp_path / "results.csv"
    (row,) = evaluate(tiny_bundle, [case], results)
    with Segmenter(tiny_bundle, engine="torch", space="mni") as segmenter:
        mask = _core.argmax(segmenter.logits(case.image[np.newaxis]))
    assert row.fused == pytest.approx(dice(mask, case.lesion), abs=1e-3)
    assert row.volume_ml == pytest.approx(case.lesion.sum() / 1000)
    before = results.read_bytes()
    (kept,) = evaluate(tiny_bundle, [case], results)
    assert results.read_bytes() == before
    assert kept.fused == pytest.approx(row.fused, abs=1e-4)
    assert len(kept.baseline) == 2 * len(THRESHOLDS)


def test_table_takes_the_threshold_that_is_best_on_the_group():
    rows = [
        Row("T1-00", "T1", "ms", 1.0, 2.0, 0.4, 0.6, [0.1, 0.3]),
        Row("T1-01", "T1", "ms", 3.0, 4.0, 0.6, 0.8, [0.5, 0.4]),
        Row("scan", "FLAIR", "real", 2.0, 1.0, 0.7, 0.9, [0.0, 0.2]),
        Row("T1-free-00", "T1", "lesion-free", 0.0, 1.5, 0.0, 0.0, [0.0, 0.0]),
    ]
    assert table(rows).splitlines()[2:] == [
        "| T1 | 2 | 2.0 | 3.0 | 0.500 | 0.700 | 0.350 |",
        "| real FLAIR | 1 | 2.0 | 1.0 | 0.700 | 0.900 | 0.200 |",
        "| lesion-free T1 | 1 | 0.0 | 1.5 |  |  |  |",
    ]


def test_the_card_says_what_was_found(tiny_bundle):
    rows = [Row("ms_patient19 T2", "T2", "real", 2.0, 1.0, 0.7, 0.9, [0.0, 0.2])]
    text = card(tiny_bundle, rows)
    assert "| ms_patient19 T2 | 2.0 | 1.0 | 0.700 | 0.900 |" in text
    assert tiny_bundle.notice in text
    assert table(rows) in text


def test_a_lesion_free_head_has_none(config, anatomies):
    case = lesion_free_case(config, anatomies, "FLAIR", 0)
    assert not case.lesion.any()
    assert (case.kind, case.name) == ("lesion-free", "FLAIR-free-00")
    assert not np.array_equal(case.image, held_out_case(config, anatomies, "FLAIR", 0).image)


def test_synth_writes_image_and_mask_on_one_grid(labelmaps, config, anatomies, tmp_path, capsys):
    arguments = ["--labelmaps", str(labelmaps), "--modalities", "FLAIR", "--cases", "1"]
    assert main(["synth", *arguments, "-o", str(tmp_path)]) == 0
    image, mask = (read_nifti(tmp_path / f"FLAIR-00{end}.nii.gz") for end in ("", "_lesion"))
    source = read_nifti(labelmaps / "seg09.nii.gz")
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-5)
    case = held_out_case(config, anatomies, "FLAIR", 0)
    np.testing.assert_array_equal(mask.reorient("SAR").array, case.lesion)
    assert capsys.readouterr().out.startswith("FLAIR-00 ")


def test_an_unknown_modality_is_named(labelmaps, tmp_path):
    arguments = ["--labelmaps", str(labelmaps), "--modalities", "PD", "-o", str(tmp_path)]
    with pytest.raises(InputError, match="'PD'") as caught:
        main(["synth", *arguments])
    assert caught.value.code == "argument.modality"


@pytest.mark.slow
def test_real_scans_and_their_masks_share_the_model_grid(data_dir, tiny_bundle):
    """Lesions of FLAIR and DWI are bright: a mask that lay elsewhere would not show it."""
    for case in real_cases(data_dir, tiny_bundle, ["FLAIR", "DWI"]):
        assert case.image.shape == case.lesion.shape == (160, 196, 160)
        brain = case.image > 0
        lesion = case.lesion == 1
        assert case.image[lesion].mean() > case.image[brain].mean() + 0.4, case.name


def test_the_benchmark_is_written_by_synth(tmp_path, capsys):
    for name in ("seg01", "seg09"):
        write_labelmap(tmp_path / f"{name}.nii.gz", (20, 24, 20))
    config = tmp_path / "config.toml"
    config.write_text(
        "[benchmark]\nseed = 1\nspacing_mm = 2\nscale = 1e5\ntrain = ['seg01']\ntest = ['seg09']\n"
    )
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--labelmaps", str(tmp_path), "-o", str(out)]
    assert main(["synth", *arguments]) == 0
    assert "| synATLAS | chronic stroke | T1 | 3 | 1 | 4 |" in capsys.readouterr().out
    assert (out / "cases.csv").exists()
    assert len(list((out / "pictures").glob("*.png"))) == 8


def test_a_case_table_of_a_download(tmp_path, capsys):
    home = tmp_path / "download" / "sub-r001s001" / "ses-1" / "anat"
    home.mkdir(parents=True)
    for end in ("_T1w", "_label-L_desc-T1lesion_mask"):
        write_labelmap(home / f"sub-r001s001_ses-1{end}.nii.gz", (8, 8, 8))
    table_path = tmp_path / "cases.csv"
    for _ in range(2):  # the second time takes the place of the first
        assert main(["prepare", "ATLAS2", str(tmp_path / "download"), "-o", str(table_path)]) == 0
    assert capsys.readouterr().out.endswith("1 images of ATLAS2, 1 in all\n")
    assert len(table_path.read_text().splitlines()) == 2


def test_a_table_of_results_again(tmp_path):
    with pytest.raises(InputError, match=r"no results\.csv"):
        main(["evaluate", str(tmp_path), "--table", "1"])
