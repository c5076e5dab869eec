"""Public layouts, as miniature trees: what is found, as which modality, with which mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mome_sdk.errors import InputError
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.training.dataset import Scan, read_table, write_table
from mome_sdk.training.preparers import LAYOUTS, prepare_dataset, split_subjects
from mome_sdk.volume import Volume


def write(path: Path, *values: int) -> None:
    """A small image; as a label, one voxel of each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((4, 4, 4), np.uint8)
    for index, value in enumerate(values):
        array.flat[index] = value
    write_nifti(Volume(array, np.eye(4)), path)


def brats(root: Path) -> None:
    home = root / "BraTS2021_00000"
    for token in ("t1", "t1ce", "t2", "flair"):
        write(home / f"BraTS2021_00000_{token}.nii.gz", 9)
    write(home / "BraTS2021_00000_seg.nii.gz", 1, 2, 4)


def atlas(root: Path) -> None:
    home = root / "Training/R001/sub-r001s001/ses-1/anat"
    stem = "sub-r001s001_ses-1_space-MNI152NLin2009aSym"
    write(home / f"{stem}_T1w.nii.gz", 9)
    write(home / f"{stem}_label-L_desc-T1lesion_mask.nii.gz", 1)


def isles(root: Path) -> None:
    part = Path("sub-strokecase0001/ses-0001")
    stem = "sub-strokecase0001_ses-0001"
    write(root / part / "dwi" / f"{stem}_dwi.nii.gz", 9)
    write(root / part / "dwi" / f"{stem}_adc.nii.gz", 9)
    write(root / "derivatives" / part / f"{stem}_msk.nii.gz", 1)


def wmh(root: Path) -> None:
    for home in (root / "Utrecht" / "2", root / "Amsterdam" / "GE3T" / "100"):
        for name in ("T1", "FLAIR"):
            write(home / "pre" / f"{name}.nii.gz", 9)
        write(home / "wmh.nii.gz", 1, 2)  # 2: another pathology


def msseg(root: Path) -> None:
    home = root / "Training/Center_01/Patient_03"
    for name in ("T1", "GADO", "T2", "FLAIR", "DP"):
        write(home / "Preprocessed_Data" / f"{name}_preprocessed.nii.gz", 9)
    write(home / "Masks" / "Consensus.nii.gz", 1)


def oasis(root: Path) -> None:
    for session in ("OAS30001_MR_d0129", "OAS30001_MR_d0757"):
        subject, _, visit = session.split("_")
        for name in ("T1w", "FLAIR"):
            write(root / session / "anat" / f"sub-{subject}_ses-{visit}_{name}.nii.gz", 9)
        write(root / session / "wmh_mask.nii.gz", 1)


def nnunet(root: Path) -> None:
    names = {"Tr": "BraTS2021_00000_t1ce", "Ts": "WMH2017_Utrecht2_flair"}
    for end, name in names.items():
        write(root / f"images{end}" / f"{name}_to_MNI152_0000.nii.gz", 9)
        write(root / f"labels{end}" / f"{name}_to_MNI152.nii.gz", 1)


# Layout -> what makes it, (modality, subject) of its images, voxels of the mask
TREES = {
    "BraTS2021": (brats, [(m, "BraTS2021_00000") for m in ("T1", "T1ce", "T2", "FLAIR")], 3),
    "ATLAS2": (atlas, [("T1", "sub-r001s001")], 1),
    "ISLES2022": (isles, [("DWI", "sub-strokecase0001")], 1),
    "WMH2017": (
        wmh,
        [(m, s) for s in ("Amsterdam-GE3T-100", "Utrecht-2") for m in ("T1", "FLAIR")],
        1,
    ),
    "MSSEG2016": (msseg, [(m, "Center_01-Patient_03") for m in ("T1", "T1ce", "T2", "FLAIR")], 1),
    "OASIS": (oasis, [(m, "OAS30001") for _ in range(2) for m in ("T1", "FLAIR")], 1),
    "nnUNet": (nnunet, [("T1ce", "BraTS2021_00000"), ("FLAIR", "WMH2017_Utrecht2")], 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_becomes_rows(tmp_path, name):
    make, expected, voxels = TREES[name]
    make(tmp_path / "download")
    scans = prepare_dataset(name, tmp_path / "download", tmp_path / "labels")
    assert [(scan.modality, scan.subject) for scan in scans] == expected
    for scan in scans:
        mask = read_nifti(scan.label).array
        assert set(np.unique(mask)) == {0, 1}
        assert mask.sum() == voxels
        assert "labels" in scan.label.parts
    write_table(scans, tmp_path / "cases.csv")
    assert len(read_table(tmp_path / "cases.csv")) == len(scans)
    assert len({scan.label for scan in scans}) == len(scans)


def test_a_name_that_contains_another_modality_is_no_trap(tmp_path):
    """`WMH2017_Utrecht2_flair` contains "t2_": the published code took it for T2."""
    nnunet(tmp_path)
    scans = prepare_dataset("nnUNet", tmp_path, tmp_path / "labels")
    assert [(scan.modality, scan.split) for scan in scans] == [("T1ce", "train"), ("FLAIR", "test")]
    write(tmp_path / "imagesTr" / "case_pd_to_MNI152_0000.nii.gz", 1)
    with pytest.raises(InputError, match="does not say its modality") as caught:
        prepare_dataset("nnUNet", tmp_path, tmp_path / "labels")
    assert caught.value.code == "data.modality"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="laid out as BraTS2021"):
        prepare_dataset("BraTS2021", tmp_path, tmp_path / "labels")
    brats(tmp_path)
    (tmp_path / "BraTS2021_00000" / "BraTS2021_00000_t2.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no .*_t2\.nii\.gz") as caught:
        prepare_dataset("BraTS2021", tmp_path, tmp_path / "labels")
    assert caught.value.code == "data.file"


def test_subjects_are_split_whole():
    def scan(subject: int, modality: str, split: str = "") -> Scan:
        name = Path(f"{subject}_{modality}.nii.gz")
        return Scan(name, name, "Made", modality, "box", f"s{subject}", split)

    scans = [scan(n, m) for n in range(50) for m in ("T1", "FLAIR")]
    split = split_subjects(scans, seed=1, val=0.16, test=0.2)
    by_subject = {each.subject: each.split for each in split}
    assert all(each.split == by_subject[each.subject] for each in split)
    found = [list(by_subject.values()).count(name) for name in ("train", "val", "test")]
    assert found == [32, 8, 10]
    assert split == split_subjects(scans, seed=1, val=0.16, test=0.2)
    assert split != split_subjects(scans, seed=2, val=0.16, test=0.2)
    given = [scan(n, "T1", "test" if n < 5 else "train") for n in range(15)]
    kept = split_subjects(given, seed=1, val=0.2, test=0.5)
    assert [each.split for each in kept[:5]] == ["test"] * 5
    assert [each.split for each in kept].count("val") == 2
