"""Files to a volume: every voxel where the headers say, whatever the order; faults are named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import JPEG2000Lossless, RLELossless

from dicom_files import PATIENT_ID, classic, enhanced, save, turned
from mome_sdk.dicom.objects import encoded
from mome_sdk.dicom.seg import make_seg
from mome_sdk.dicom.series import checked_series, open_study
from mome_sdk.errors import DicomError, GeometryError, InputError, MomeError
from mome_sdk.segmentation import Segmentation
from mome_sdk.segmenter import Segmenter
from mome_sdk.study import Chosen
from mome_sdk.volume import Volume
from phantom import grid, phantom

from .conftest import bright, read, world_mean

LESION_MM = (-32.0, 20.0, 14.0)  # left, frontal, high
SPACING_MM = 6.0
WAYS = ["plain", "oblique", "reversed"]
# Axial, sagittal and coronal slices; rows, columns and slices in both directions.
AXES = ["LPS", "RPS", "LAI", "RAS", "PIR", "ASL", "LIP", "RSA"]


def place(axes: str, way: str) -> Volume:
    """The phantom as slices of some orientation."""
    where = grid(SPACING_MM).reorient(axes)
    if way == "oblique":
        where = turned(where, 20.0, (1.0, 2.0, 0.5))
    return phantom(LESION_MM, where=where)


def written(axes: str, way: str, folder: Path) -> None:
    """The phantom as a series; "reversed" in names of files and instance numbers."""
    images = classic(place(axes, way))
    if way == "reversed":
        for number, image in enumerate(images):
            image.InstanceNumber = len(images) - number
        images.reverse()
    save(images, folder)


def judged(chosen: Chosen, result: Segmentation, folder: Path, dcm2niix: Any, dcmqi: Any) -> None:
    """Other programs find the lesion in the series, and the segment in the SEG, at one place."""
    (folder / "seg.dcm").write_bytes(encoded(make_seg(chosen.series, result, segments="all")))
    source_mm = world_mean(dcm2niix(folder / "in", folder / "nii"), above=250)
    (segment,) = dcmqi(folder / "seg.dcm", folder / "dcmqi")
    found_mm = world_mean(segment, above=0)
    # The ball's voxels are not spread evenly around its centre; a voxel is 6 mm.
    np.testing.assert_allclose(source_mm, LESION_MM, atol=SPACING_MM / 2)
    np.testing.assert_allclose(found_mm, source_mm, atol=SPACING_MM / 2)
    assert found_mm[0] < -20, "the patient's left"
    assert found_mm[2] > 5, "up"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axes", AXES)
def test_a_lesion_stays_where_it_is_by_the_word_of_other_programs(
    axes: str, way: str, tmp_path: Path, dcm2niix: Any, dcmqi: Any
) -> None:
    written(axes, way, tmp_path / "in")
    chosen = read(tmp_path / "in")
    judged(chosen, bright(chosen.volume), tmp_path, dcm2niix, dcmqi)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axes", AXES)
def test_the_same_from_end_to_end(
    axes: str,
    way: str,
    tmp_path: Path,
    bright_segmenter: Segmenter,
    dcm2niix: Any,
    dcmqi: Any,
) -> None:
    """To the model's grid and back, with files read as users' are."""
    written(axes, way, tmp_path / "in")
    chosen = read(tmp_path / "in")
    judged(chosen, bright_segmenter.predict(chosen.volume), tmp_path, dcm2niix, dcmqi)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axes", AXES)
def test_a_missing_slice_is_refused(axes: str, way: str, tmp_path: Path) -> None:
    images = classic(place(axes, way))
    del images[7]
    if way == "reversed":
        images.reverse()
    save(images, tmp_path / "in")
    text = r"\[dicom.slice-gap\] Series 1 \([0-9a-f]{8}\): Slices \d+ and \d+ of \d+ are 12.00 mm"
    with pytest.raises(GeometryError, match=text):
        read(tmp_path / "in")


def changed(images: list[Dataset], fault: str) -> list[Dataset]:
    """A series with one fault."""
    normal = np.cross(images[0].ImageOrientationPatient[:3], images[0].ImageOrientationPatient[3:])
    across = np.array([float(c) for c in images[0].ImageOrientationPatient[:3]])
    for number, image in enumerate(images):
        here = np.array([float(mm) for mm in image.ImagePositionPatient])
        if fault == "tilt":
            here += number * SPACING_MM * np.tan(np.radians(8.0)) * across
        if fault == "uneven" and number > 10:
            here += 2.0 * normal
        if fault == "bent" and number == 10:
            here += 2.0 * across
        image.ImagePositionPatient = [f"{mm:.6g}" for mm in here]
    if fault == "duplicate":
        images[4].ImagePositionPatient = images[5].ImagePositionPatient
    elif fault == "every second":
        for image in images:
            image.SpacingBetweenSlices = f"{SPACING_MM:g}"
        images = images[::2]
    elif fault == "end":
        for image in images:
            image.ImagesInAcquisition = len(images)
        images = images[:-1]
    elif fault == "stray":
        images[-1].EchoTime = 15.0
    elif fault == "size":
        images[3].PixelSpacing = ["3", "3"]
    elif fault == "no position":
        del images[3].ImagePositionPatient
    elif fault == "no orientation":
        for image in images:
            del image.ImageOrientationPatient
    elif fault == "crooked":
        for image in images:
            image.ImageOrientationPatient = ["1", "0", "0", "0.5", "0.8", "0"]
    elif fault == "twice":
        images[4].SOPInstanceUID = images[5].SOPInstanceUID
    elif fault == "slope":
        images[3].RescaleSlope, images[3].RescaleIntercept = "0", "0"
    return images


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ("tilt", "dicom.slice-tilt", "8.0 degrees off their normal"),
        ("uneven", "dicom.slice-uneven", "mm away from where an even stack"),
        ("bent", "dicom.slice-uneven", "2.00 mm away"),
        ("duplicate", "dicom.slice-duplicate", "are at the same place"),
        ("every second", "dicom.slice-gap", "12.00 mm apart, their headers say 6.00 mm"),
        ("end", "dicom.slice-missing", "26 images are here, the scanner made 27"),
        ("stray", "dicom.slice-stray", "a single slice of the series differs"),
        ("size", "dicom.slice-size", "pixels of 3 to 6 mm"),
        ("no position", "dicom.slice-place", "no ImagePositionPatient of 3 numbers"),
        ("no orientation", "dicom.slice-place", "no ImageOrientationPatient of 6 numbers"),
        ("crooked", "dicom.slice-place", "no pair of perpendicular directions"),
        ("twice", "dicom.duplicate", "holds 1 images twice"),
        ("slope", "dicom.pixels", "the rescale slope of a slice is 0"),
    ],
)
def test_faults_are_named(fault: str, code: str, text: str, tmp_path: Path) -> None:
    save(changed(classic(place("LPS", "plain")), fault), tmp_path / "in")
    with pytest.raises(MomeError) as caught:
        read(tmp_path / "in")
    assert caught.value.code == code
    assert text in str(caught.value)
    assert re.match(r"(The orientation of )?Series 1 \([0-9a-f]{8}\)", caught.value.message)
    assert isinstance(caught.value, GeometryError) == code.startswith("dicom.slice")


@pytest.mark.usefixtures("in_this_process")
def test_a_single_slice_is_refused(tmp_path: Path) -> None:
    save(classic(place("LPS", "plain"))[:1], tmp_path / "in")
    with open_study(tmp_path / "in") as study, pytest.raises(GeometryError, match="slice-single"):
        checked_series(study.stacks[0], modality="FLAIR", reasons=())


@pytest.mark.usefixtures("in_this_process")
def test_a_frame_count_that_disagrees_is_refused(tmp_path: Path) -> None:
    image = enhanced([place("LPS", "plain")])
    image.NumberOfFrames = 5
    save([image], tmp_path / "in")
    with pytest.raises(DicomError, match=r"\[dicom.damaged\] .*announces 5 frames and describes"):
        read(tmp_path / "in")


@pytest.mark.usefixtures("in_this_process")
def test_frames_without_groups_are_refused(tmp_path: Path) -> None:
    image = classic(place("LPS", "plain"))[0]
    image.NumberOfFrames = 2
    save([image], tmp_path / "in")
    with pytest.raises(DicomError, match=r"\[dicom.multiframe\]"):
        read(tmp_path / "in")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("axes", ["LPS", "PIR", "RSA"])
def test_voxels_are_where_they_were(axes: str, tmp_path: Path) -> None:
    volume = place(axes, "oblique")
    save(classic(volume), tmp_path / "in")
    back = read(tmp_path / "in").volume.reorient(axes)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-6)  # 10 digits in the header
    np.testing.assert_array_equal(back.array, np.round(volume.array))


@pytest.mark.usefixtures("in_this_process")
def test_each_slice_has_its_own_slope(tmp_path: Path) -> None:
    volume = place("LPS", "plain")
    images = classic(volume)
    for k, image in enumerate(images):
        image.RescaleSlope, image.RescaleIntercept = f"{1 + k / 8:g}", "-3"
    save(images, tmp_path / "in")
    slopes = 1 + np.arange(len(images)) / 8
    expected = (np.round(volume.array) * slopes - 3).astype(np.float32)
    np.testing.assert_array_equal(read(tmp_path / "in").volume.array, expected)


@pytest.mark.usefixtures("in_this_process")
def test_enhanced_frames_have_stacks_slopes_and_b_values(tmp_path: Path) -> None:
    lesion = place("PIR", "oblique")
    plain = Volume(np.minimum(lesion.array, 120.0), lesion.affine)
    image = enhanced([plain, lesion], "DWI", b_values=(0.0, 1000.0), slopes=(1.0, 0.5, 2.0))
    save([image], tmp_path / "in")
    chosen = read(tmp_path / "in")
    np.testing.assert_allclose(chosen.volume.affine, lesion.affine, atol=1e-6)
    assert chosen.series.modality == "DWI"
    assert [frame.number % 2 for frame in chosen.series.frames] == [0] * lesion.array.shape[2]
    # A slope of 2 stores half of a rounded value, rounded.
    np.testing.assert_allclose(chosen.volume.array, lesion.array, atol=1.51)
    assert chosen.volume.array.max() == 400


@pytest.mark.usefixtures("in_this_process")
def test_dcm2niix_reads_the_same_from_an_enhanced_file(
    tmp_path: Path, dcm2niix: Callable[[Path, Path], nib.Nifti1Image]
) -> None:
    save([enhanced([place("RSA", "oblique")])], tmp_path / "in")
    chosen = read(tmp_path / "in")
    mine = nib.Nifti1Image(chosen.volume.array, chosen.volume.affine)
    theirs = dcm2niix(tmp_path / "in", tmp_path / "nii")
    np.testing.assert_allclose(world_mean(mine, 250), world_mean(theirs, 250), atol=1e-3)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_images_give_the_same_voxels(syntax: str, tmp_path: Path) -> None:
    """64 x 64 pixels: the encoder of JPEG 2000 takes no fewer."""
    array = np.random.default_rng(0).integers(0, 4096, (64, 64, 8)).astype(np.float32)
    volume = Volume(array, np.diag((-4.0, -4.0, 10.0, 1.0)))
    (tmp_path / "in").mkdir()
    for path in save(classic(volume), tmp_path / "native"):
        image = dcmread(path)
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(tmp_path / "in" / path.name)
    np.testing.assert_array_equal(read(tmp_path / "in").volume.array, volume.array)


def test_a_zip_file_gives_what_its_folder_gives(
    oblique: tuple[Path, Volume], chosen: Chosen, tmp_path: Path
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "study"), "zip", oblique[0]))
    zipped = read(archive)
    np.testing.assert_array_equal(zipped.volume.array, chosen.volume.array)
    assert zipped.series.label == chosen.series.label


def test_files_are_a_source_too(oblique: tuple[Path, Volume], chosen: Chosen) -> None:
    files = sorted(oblique[0].iterdir(), reverse=True)
    np.testing.assert_array_equal(read(files).volume.array, chosen.volume.array)


@pytest.mark.usefixtures("in_this_process")
def test_other_files_are_passed_over(tmp_path: Path) -> None:
    images = classic(place("LPS", "plain"))
    save(images, tmp_path / "in" / "deep")
    other = images[0]
    other.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"  # CT
    save([other], tmp_path / "in", stem="CT")
    (tmp_path / "in" / "README.txt").write_text("not DICOM")
    (tmp_path / "in" / ".hidden").write_bytes(b"\0" * 128 + b"DICM")
    with open_study(tmp_path / "in") as study:
        assert study.others == 2
        assert len(study.stacks) == 1


def two(first: Sequence[Dataset], second: Sequence[Dataset], folder: Path) -> None:
    save(first, folder, stem="A")
    save(second, folder, stem="B")


@pytest.mark.usefixtures("in_this_process")
def test_two_studies_or_patients_are_refused(tmp_path: Path) -> None:
    volume = place("LPS", "plain")
    two(classic(volume), classic(volume, study="other"), tmp_path / "studies")
    with pytest.raises(DicomError, match=r"\[dicom.several-studies\] .* of 2 studies"):
        read(tmp_path / "studies")
    foreign = classic(volume, number=2, PatientID=f"{PATIENT_ID}-other")
    two(classic(volume), foreign, tmp_path / "patients")
    with pytest.raises(DicomError, match=r"\[dicom.several-studies\] .* of 2 patients"):
        read(tmp_path / "patients")


@pytest.mark.usefixtures("in_this_process")
def test_a_folder_without_images_and_no_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("nothing")
    with pytest.raises(DicomError, match=r"\[dicom.no-image\] Of 1 files none"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"\[argument.input\] There is no file or folder"):
        read(tmp_path / "none")


@pytest.mark.usefixtures("in_this_process")
def test_labels_depend_on_nothing_but_the_images(tmp_path: Path) -> None:
    """Of a series that holds b0 and b1000, under other names of files."""
    volume = place("LPS", "plain")
    labels: list[Any] = []
    for turn, folder in ((1, "one"), (-1, "two")):
        images = classic(volume, "b0", number=4)
        for k, image in enumerate(classic(volume, "DWI", number=4)):
            image.InstanceNumber = 100 + k
            images.append(image)
        save(images[::turn], tmp_path / folder)
        with open_study(tmp_path / folder) as study:
            labels.append([(stack.label, stack.facts["BValue"]) for stack in study.stacks])
    assert labels[0] == labels[1]
    assert [b_value for _, b_value in labels[0]] == [0.0, 1000.0]
    assert labels[0][0][0].endswith(", part 1 of 2")
