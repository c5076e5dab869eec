"""Real scans: every one runs, and its mask lies where the scan lies."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mome_sdk.bundle import ModelBundle
from mome_sdk.cli import main
from mome_sdk.nifti import read_nifti
from mome_sdk.segmenter import Segmenter
from phantom import BrightEngine

# Scan and expert label below MOME_TEST_DATA, and the space the scan is in.
SCANS = [
    *(
        (f"prepared/{case}.nii.gz", f"prepared/{case}_lesion.nii.gz", "model")
        for case in ("gliomaDU_T1ce", "ms26_FLAIR", "stroke9_DWI")
    ),
    *(
        (f"ms_patient{patient}/{modality}.nii.gz", f"ms_patient{patient}/lesion.nii.gz", "mni")
        for patient, modalities in (("19", "FLAIR T1 T2"), ("26", "FLAIR T1 T1ce T2"))
        for modality in modalities.split()
    ),
]


# Every scan that is there, as a scanner or a database gave it.
NATIVE = [
    *(name for name, _, _ in SCANS),
    *(f"ms_native_patient12/{name}.nii.gz" for name in ("FLAIR", "T1")),
    *(f"stroke_case0009/{name}.nii.gz" for name in ("adc", "dwi", "flair")),
    *(f"glioma_TCGA-DU-7294/{name}.nii.gz" for name in ("FLAIR", "T1", "T1ce", "T2")),
]


def dice(found: np.ndarray, known: np.ndarray) -> float:
    return (
        2.0 * np.count_nonzero(found & known) / (np.count_nonzero(found) + np.count_nonzero(known))
    )


def assert_same_place(mask: Path, scan: Path) -> None:
    before, after = nib.load(scan), nib.load(mask)
    assert after.shape == before.shape
    np.testing.assert_allclose(after.affine, before.affine, rtol=0.0, atol=1e-6)
    for form in ("get_qform", "get_sform"):
        matrix, code = getattr(after, form)(coded=True)
        expected, expected_code = getattr(before, form)(coded=True)
        assert code == expected_code
        np.testing.assert_allclose(matrix, expected, rtol=0.0, atol=1e-6)
    assert set(np.unique(np.asarray(after.dataobj))) <= {0, 1}


def test_the_list_is_complete(data_dir: Path) -> None:
    there = {
        str(path.relative_to(data_dir))
        for folder in ("prepared", "ms_patient19", "ms_patient26")
        for path in (data_dir / folder).glob("*.nii.gz")
    }
    assert there == {name for scan, label, _ in SCANS for name in (scan, label)}


@pytest.mark.parametrize(("scan", "label", "space"), SCANS)
def test_bright_voxels_of_a_real_scan_stay_where_they_are(
    scan: str,
    label: str,
    space: str,
    data_dir: Path,
    whole_head_bundle: ModelBundle,
    tmp_path: Path,
) -> None:
    """An engine whose answer is known: what is bright in the scan is bright in the mask."""
    assert (data_dir / label).is_file()
    path = data_dir / scan
    segmenter = Segmenter(whole_head_bundle, BrightEngine(threshold=1.8), space=space)  # type: ignore[arg-type]
    segmenter.predict(path).save(tmp_path / "mask.nii.gz")
    assert_same_place(tmp_path / "mask.nii.gz", path)
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    array = read_nifti(path).array
    limit = np.sort(array, axis=None)[-np.count_nonzero(mask)]
    # "model" interpolates nothing. "mni" smooths twice on its way, which costs noisy borders.
    assert dice(mask, array >= limit) > (0.999 if space == "model" else 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("scan", NATIVE)
def test_every_scan_passes_in_its_native_space(
    scan: str, data_dir: Path, whole_head_bundle: ModelBundle, tmp_path: Path
) -> None:
    """Registered, checked, and back on its own grid, with nothing overruled."""
    path = data_dir / scan
    result = Segmenter(whole_head_bundle, BrightEngine(threshold=1.8)).predict(path)
    result.save(tmp_path / "mask.nii.gz")
    assert_same_place(tmp_path / "mask.nii.gz", path)
    assert result.mask.any()
    made = result.provenance["preparation"]
    assert made["forced"] == []
    with_skull = scan.startswith("ms_native")
    assert made["brain"] == ("template" if with_skull else "image")
    assert made["registration"].startswith("none" if scan.startswith("prepared") else "niimath")


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "label", "space"), SCANS)
def test_the_demonstration_model_segments_it(
    scan: str,
    label: str,
    space: str,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask = tmp_path / "mask.nii.gz"
    assert main(["predict", str(data_dir / scan), "-o", str(mask), "--space", space, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert_same_place(mask, data_dir / scan)
    found = np.asarray(nib.load(mask).dataobj) > 0
    known = read_nifti(data_dir / label).array > 0
    with capsys.disabled():
        print(f"\n{scan}: Dice {dice(found, known):.3f}, {result['volume_ml']:.1f} mL found")
