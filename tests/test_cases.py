"""Which images are taken from a folder or a list, and what their masks are called."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mome_sdk.cases import Case, collected_cases, is_collection, named_cases
from mome_sdk.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def collected(source: Path, output: Path, **wanted: bool) -> list[Case]:
    return collected_cases(source, output, **{"probability": False, "report": False, **wanted})


def masks(source: Path, output: Path) -> dict[str, str]:
    """Name of each image -> its mask below the output."""
    cases = collected(source, output)
    return {case.name: case.mask.relative_to(output).as_posix() for case in cases}


def test_masks_repeat_the_tree_of_a_folder(tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "scans" / "out"
    touch(scans, "b.nii", "a/z.nii.gz", "a/deep/er/x.nii.gz", "a/notes.txt", "c.png")
    touch(scans, ".hidden.nii", "._b.nii", ".git/x.nii.gz", "out/b.nii.gz")
    assert masks(scans, out) == {
        "a/deep/er/x.nii.gz": "a/deep/er/x.nii.gz",
        "a/z.nii.gz": "a/z.nii.gz",
        "b.nii": "b.nii.gz",
    }
    assert [case.image for case in collected(scans, out)][2] == scans / "b.nii"


def test_everything_wanted_lies_beside_the_mask(tmp_path: Path) -> None:
    touch(tmp_path / "scans", "a/x.nii", "sub-1/anat/sub-1_FLAIR.nii.gz")
    (tmp_path / "list.txt").write_text("scans/a/x.nii\nscans/sub-1/anat/sub-1_FLAIR.nii.gz\n")
    plain, bids = collected(tmp_path / "list.txt", tmp_path / "out", probability=True, report=True)
    assert [path.name for path in plain.files] == [
        "x.nii.gz",
        "x_probability.nii.gz",
        "x.png",
        "x.html",
    ]
    assert [path.name for path in bids.files] == [
        "sub-1_space-FLAIR_desc-lesion_mask.nii.gz",
        "sub-1_space-FLAIR_desc-lesion_probseg.nii.gz",
        "sub-1_space-FLAIR_desc-lesion_mask.png",
        "sub-1_space-FLAIR_desc-lesion_mask.html",
    ]
    assert (plain.bids, bids.bids) == (False, True)


@pytest.mark.parametrize("described", [True, False])
def test_of_a_bids_dataset_images_that_show_lesions_are_taken(
    described: bool, tmp_path: Path
) -> None:
    study, out = tmp_path / "study", tmp_path / "study" / "derivatives" / "mome"
    touch(
        study,
        *("sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_ce-gado_T1w.nii"),
        *("sub-02/ses-a/anat/sub-02_ses-a_run-2_FLAIR.nii.gz", "sub-02/ses-a/anat/ses.nii.gz"),
        *("sub-02/ses-a/anat/sub-02_ses-a_T2starw.nii.gz", "sub-02/ses-a/anat/sub-02_PDw.nii"),
        *("sub-01/anat/sub-01_desc-brain_mask.nii.gz", "sub-01/func/sub-01_task-x_bold.nii.gz"),
        *("derivatives/fs/sub-01/anat/sub-01_T1w.nii.gz", "sourcedata/sub-01/anat/sub-01_T1w.nii"),
        *("xsub-1/anat/xsub-1_T1w.nii", "code/scan.nii"),
    )
    if described:
        touch(study, "dataset_description.json")
    assert masks(study, out) == {
        "sub-01/anat/sub-01_T1w.nii.gz": "sub-01/anat/sub-01_space-T1w_desc-lesion_mask.nii.gz",
        "sub-01/anat/sub-01_ce-gado_T1w.nii": "sub-01/anat/"
        "sub-01_ce-gado_space-T1w_desc-lesion_mask.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_run-2_FLAIR.nii.gz": "sub-02/ses-a/anat/"
        "sub-02_ses-a_run-2_space-FLAIR_desc-lesion_mask.nii.gz",
    }
    subject = masks(study / "sub-02", out)
    assert list(subject) == ["ses-a/anat/sub-02_ses-a_run-2_FLAIR.nii.gz"]
    assert subject.popitem()[1].startswith("sub-02/ses-a/anat/")


def test_a_diffusion_series_is_left_out_but_not_its_single_volume(tmp_path: Path) -> None:
    for name, shape in (("1", (4, 4, 4, 7)), ("2", (4, 4, 4)), ("3", (4, 4, 4, 1))):
        path = tmp_path / f"sub-{name}" / "dwi" / f"sub-{name}_dwi.nii.gz"
        path.parent.mkdir(parents=True)
        nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)).to_filename(path)
    touch(tmp_path, "sub-4/dwi/sub-4_dwi.nii.gz")  # damaged: its case will say so
    assert [name[:5] for name in masks(tmp_path, tmp_path / "out")] == ["sub-2", "sub-3", "sub-4"]


def test_a_list_names_images_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "lists/a.txt", "data/x/1.nii.gz", "data/y/1.nii.gz")
    names = ["../data/x/1.nii.gz", str(tmp_path / "data/y/1.nii.gz")]
    (tmp_path / "lists/a.txt").write_text("\n".join(["\ufeff" + names[0], "", names[1]]))
    (tmp_path / "lists/a.csv").write_text(
        f'patient,image\n7,{names[0]}\n8,"{names[1]}"\n9,\n', "utf-8-sig"
    )
    monkeypatch.chdir(tmp_path)
    for source in (Path("lists/a.txt"), Path("lists/a.csv")):
        assert is_collection(source)
        expected = dict(zip(names, ("x/1.nii.gz", "y/1.nii.gz"), strict=True))
        assert masks(source, Path("out")) == expected
        assert all(case.image.is_file() for case in collected(source, Path("out")))


def test_a_list_of_one_image_needs_no_tree(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("deep/down/x.nii.gz")
    assert masks(tmp_path / "one.txt", tmp_path / "out") == {"deep/down/x.nii.gz": "x.nii.gz"}


def test_a_name_that_is_no_text_is_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.nii.gz")
    touch(tmp_path / "scans", name)
    assert list(masks(tmp_path / "scans", tmp_path / "out")) == [name]
    (tmp_path / "scans" / "list.txt").write_bytes(b"caf\xe9.nii.gz\n")
    assert list(masks(tmp_path / "scans" / "list.txt", tmp_path / "out")) == [name]


@pytest.mark.parametrize(
    ("source", "output", "code", "text"),
    [
        ("scans", "scans", "argument.output", "is the folder of the scans itself"),
        ("empty", "out", "argument.input", "names no image"),
        ("twice", "out", "argument.output", "would be written for"),
        ("empty.txt", "out", "argument.input", "names no image"),
        ("same.txt", "out", "argument.output", "would be written for"),
        ("over.txt", ".", "argument.output", "is the input image itself"),
        ("none.txt", "out", "argument.input", "cannot be read: No such file"),
        ("other.csv", "out", "argument.input", "has the columns 'name, file'"),
        ("study", "out", "argument.input", "in a BIDS dataset"),
    ],
)
def test_what_is_no_collection_is_refused(
    source: str, output: str, code: str, text: str, tmp_path: Path
) -> None:
    touch(tmp_path, "scans/x.nii", "twice/x.nii", "twice/x.nii.gz", "empty.txt", "scans/y.nii.gz")
    touch(tmp_path, "study/dataset_description.json", "study/x.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "same.txt").write_text("scans/x.nii\nscans/../scans/x.nii\n")
    (tmp_path / "over.txt").write_text("scans/y.nii.gz\nempty/z.nii\n")
    (tmp_path / "other.csv").write_text("name,file\n")
    output = "." if output == "." else str(tmp_path / output)
    with pytest.raises(InputError, match=text) as refusal:
        collected(tmp_path / source, tmp_path / output)
    assert refusal.value.code == code


def test_a_name_that_is_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder") as refusal:
        named_cases([tmp_path / "scan"], tmp_path / "out", probability=False, report=False)
    assert refusal.value.code == "argument.input"


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "scans/a/x.nii", "scans/b/x.nii")
    scandir = os.scandir

    def forbid(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(InputError, match="b' cannot be read: Permission denied") as refusal:
        collected(tmp_path / "scans", tmp_path / "out")
    assert refusal.value.code == "argument.input"
