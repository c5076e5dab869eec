"""`mome predict` with a DICOM study: what is chosen, written, said and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pydicom
import pytest

import mome_sdk
from dicom_files import PATIENT_ID, PATIENT_NAME, classic, save
from mome_sdk.bundle import ModelBundle
from mome_sdk.cli import main
from mome_sdk.nifti import NOTICE, read_nifti, write_nifti
from mome_sdk.segmenter import Segmenter
from mome_sdk.volume import Volume
from phantom import BrightEngine, grid, phantom

SCHEMA = json.loads(
    (Path(mome_sdk.__file__).parent / "schemas" / "result.schema.json").read_text("utf-8")
)
PHANTOM = phantom(where=grid(6.0).reorient("LPS"))
PLAIN = Volume(np.minimum(PHANTOM.array, 110.0), PHANTOM.affine)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A T2 without lesion, a FLAIR with one, an ADC map."""
    folder = tmp_path / "study"
    save(classic(PLAIN, "T2", number=3), folder / "a")
    save(classic(PHANTOM, "FLAIR", number=4), folder / "b")
    save(classic(PHANTOM, "ADC", number=5), folder / "c")
    return folder


@pytest.fixture
def predict(whole_head_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`mome predict` in this process, with an engine that calls bright voxels lesion."""

    def made(*_: object, **__: object) -> Segmenter:
        return Segmenter(whole_head_bundle, BrightEngine(), space="mni")

    monkeypatch.setattr("mome_sdk.cli.Segmenter", made)

    def run(*arguments: object) -> int:
        return main(["predict", *map(str, arguments)])

    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_all_formats_of_one_result_agree(
    study: Path, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [study, "-o", out, "--format", "nifti,seg,sr,sc", "--json", "--report"]
    assert predict(*command, "--probability") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    jsonschema.validate(result, SCHEMA)
    assert files(out) == {
        *("lesions.nii.gz", "lesions_probability.nii.gz", "lesions.png", "lesions.html"),
        *("lesions_seg.dcm", "lesions_sr.dcm", "lesions_sc.dcm"),
    }
    assert result["series"]["label"].startswith("Series 4 (")
    assert result["series"]["modality"] == "FLAIR"
    assert result["series"]["slices"] == PHANTOM.array.shape[2]
    assert len(result["series"]["considered"]) == 3
    (lesion,) = result["lesions"]
    np.testing.assert_allclose(lesion["centroid_mm"], (-32.0, 20.0, 14.0), atol=3.0)
    mask = read_nifti(out / "lesions.nii.gz")
    np.testing.assert_allclose(mask.affine, PHANTOM.affine, atol=1e-4)
    assert np.count_nonzero(mask.array) == lesion["voxels"]
    seg = pydicom.dcmread(out / "lesions_seg.dcm")
    assert int(seg.pixel_array.sum()) == lesion["voxels"]
    report = pydicom.dcmread(out / "lesions_sr.dcm")
    assert f"{lesion['volume_ml']:.9g}"[:6] in str(report)
    assert seg.SOPInstanceUID in str(report), "the SR refers to the SEG"
    for name in ("seg", "sr", "sc"):
        made = pydicom.dcmread(out / f"lesions_{name}.dcm")
        assert (made.PatientName, made.PatientID) == (PATIENT_NAME, PATIENT_ID)
        assert "research use only" in made.SeriesDescription
    for text in (said.out, said.err, (out / "lesions.html").read_text()):
        assert PATIENT_ID not in text
        assert "Zora" not in text


@pytest.mark.usefixtures("in_this_process")
def test_a_repeated_run_makes_the_same_objects(
    study: Path, predict: Callable[..., int], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert predict(study, "-o", tmp_path / name, "--format", "seg,sr,sc") == 0
    for name in files(tmp_path / "one"):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert first == second


def test_a_zip_file_and_one_mask(
    study: Path, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = shutil.make_archive(str(tmp_path / "study"), "zip", study)
    assert predict(archive, "-o", tmp_path / "mask.nii.gz") == 0
    said = capsys.readouterr().out
    assert said.startswith("Series 4 (")
    assert "FLAIR, long echo and long inversion time [EchoTime 92, InversionTime 2500]" in said
    assert NOTICE in said
    assert nib.load(tmp_path / "mask.nii.gz").shape == PHANTOM.array.shape


@pytest.mark.usefixtures("in_this_process")
def test_another_series_can_be_asked_for_and_an_empty_result_has_no_seg(
    study: Path, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [study, "-o", out, "--series", "t2", "--format", "seg,sr", "--json"]
    assert predict(*words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["series"]["modality"] == "T2"
    assert result["lesions"] == []
    assert result["seg"] is None
    assert files(out) == {"lesions_sr.dcm"}
    assert predict(*words, "--empty-seg") == 0
    assert files(out) == {"lesions_sr.dcm", "lesions_seg.dcm"}
    assert not pydicom.dcmread(out / "lesions_seg.dcm").pixel_array.any()
    assert predict(*words) == 0
    assert files(out) == {"lesions_sr.dcm"}, "the SEG of an earlier run says something else"


@pytest.mark.usefixtures("in_this_process")
def test_one_segment_for_all(study: Path, predict: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(study, "-o", out, "--format", "seg", "--segments", "all") == 0
    seg = pydicom.dcmread(out / "lesions_seg.dcm")
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Lesions"]


@pytest.mark.usefixtures("in_this_process")
def test_rules_of_a_site_decide(
    study: Path, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.toml").write_text('preference = ["T2"]')
    words = [study, "-o", tmp_path / "m.nii", "--series-rules", tmp_path / "site.toml", "-v"]
    assert predict(*words) == 0
    said = capsys.readouterr()
    assert ": T2, " in said.out
    assert "not used (a map computed from diffusion images" in said.err


@pytest.mark.usefixtures("in_this_process")
def test_a_gap_in_the_chosen_series_is_not_passed_over(
    study: Path, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is a whole T2, but FLAIR comes first."""
    sorted((study / "b").iterdir())[5].unlink()
    assert predict(study, "-o", tmp_path / "m.nii") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mome: error [dicom.slice-gap]: Series 4 (")
    assert not (tmp_path / "m.nii").exists()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["{study}", "-o", "x.nii", "--series", "pet"], "argument.usage"),
        (["{study}", "-o", "x.nii", "--format", "pdf"], "argument.usage"),
        (["{study}", "-o", "x.nii", "--format", "seg"], "argument.output"),
        (["{study}", "-o", "x.dcm", "--format", "seg"], "argument.output"),
        (["{study}", "-o", "none/out", "--format", "seg"], "argument.output-folder"),
        (["{study}", "{study}", "-o", "out"], "argument.input"),
        (["{study}", "-o", "out", "--ray", "2"], "argument.input"),
        (["{study}", "-o", "x.nii", "--series", "dwi"], "dicom.no-series"),
        (["{study}", "-o", "x.nii", "--series-rules", "none.toml"], "argument.series-rules"),
        (["{scan}", "-o", "x.nii", "--series", "t1"], "argument.series"),
        (["{scan}", "-o", "x.nii", "--empty-seg"], "argument.empty-seg"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    words: list[str],
    code: str,
    study: Path,
    predict: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nifti(PHANTOM, tmp_path / "scan.nii")
    assert predict(*(word.format(study=study, scan="scan.nii") for word in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mome: error [{code}]: ")
    assert PATIENT_ID not in line


def test_a_folder_with_nifti_files_is_a_folder_of_scans(
    study: Path, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nifti(PHANTOM, study / "scan.nii")
    assert predict(study, "-o", tmp_path / "out", "--format", "seg") == 2
    assert "[argument.format]: --format is given, but no DICOM study" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_a_refused_registration_has_a_picture(
    whole_head_bundle: ModelBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of the template; a program that leaves it where it is stands for the registration."""

    def made(*_: object, **__: object) -> Segmenter:
        return Segmenter(whole_head_bundle, BrightEngine())

    monkeypatch.setattr("mome_sdk.cli.Segmenter", made)
    monkeypatch.setattr(
        "mome_sdk.preprocess.register.registrations", lambda *_, **__: iter([np.eye(4)])
    )
    monkeypatch.setattr("mome_sdk.preprocess.skull_strip.is_installed", lambda: False)
    template = whole_head_bundle.template
    half = template.crop((0, 100, 0), (197, 133, 189)).reorient("LPS")
    scaled = Volume(half.array / half.array.max() * 1000, half.affine)
    save(classic(scaled), tmp_path / "study")
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "study"), "-o", str(out), "--format", "sr"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "[brain.cut]" in said
    assert files(out) == {"lesions_refused.png"}


@pytest.mark.parametrize("missing", ["pydicom", "highdicom"])
def test_a_missing_extra_is_named_with_the_line_that_adds_it(
    missing: str, study: Path, tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "from mome_sdk.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["predict", str(study), "-o", str(tmp_path / "m.nii")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"mome: error [dicom.missing]: DICOM needs {missing}, which is")
    assert 'pip install "mome-sdk[dicom]"' in done.stderr


@pytest.mark.slow
def test_the_demonstration_model_finds_the_same_in_a_real_scan_as_dicom(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    scan = read_nifti(data_dir / "prepared" / "ms26_FLAIR.nii.gz")
    known = read_nifti(data_dir / "prepared" / "ms26_FLAIR_lesion.nii.gz").array > 0
    sagittal = scan.reorient("PIR")
    top = float(sagittal.array.max())
    stored = Volume(np.clip(sagittal.array, 0, None) / top * 4000, sagittal.affine)
    save(classic(stored), tmp_path / "study")
    out = tmp_path / "out"
    words = ["predict", str(tmp_path / "study"), "-o", str(out), "--space", "mni"]
    assert main([*words, "--format", "nifti,seg,sr,sc", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = read_nifti(out / "lesions.nii.gz")
    there = found.resample(scan.grid, mode="nearest").array > 0
    dice = 2 * np.count_nonzero(there & known) / (there.sum() + known.sum())
    print(f"Dice {dice:.3f}, {len(result['lesions'])} lesions, {result['timings']}")
    assert dice > 0.43  # 0.4346 from the NIfTI file itself; grey values are rounded here
    seg = pydicom.dcmread(out / "lesions_seg.dcm")
    assert int(seg.pixel_array.sum()) == int(found.array.sum())
