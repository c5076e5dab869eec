"""DICOM SEG: on the source's slices, valid, the same in other programs, the same twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from dicom_files import PATIENT_ID, PATIENT_NAME, enhanced, save
from mome_sdk.dicom.objects import encoded
from mome_sdk.dicom.seg import make_seg
from mome_sdk.errors import DicomError, GeometryError, InputError
from mome_sdk.segmentation import Segmentation
from mome_sdk.study import Chosen
from mome_sdk.volume import Volume
from phantom import grid, phantom

from .conftest import PROVENANCE, bright, read


@pytest.fixture(scope="module")
def two_lesions(chosen: Chosen) -> Segmentation:
    """The phantom's lesion, and a single voxel in the first slice."""
    mask = bright(chosen.volume).mask.copy()
    mask[16, 20, 0] = 1
    return Segmentation(mask, chosen.volume.affine, provenance=PROVENANCE)


def test_other_programs_find_the_same_voxels_and_volumes(
    chosen: Chosen,
    two_lesions: Segmentation,
    tmp_path: Path,
    dciodvfy: Callable[[Path], list[str]],
    dcmqi: Callable[..., list[nib.Nifti1Image]],
) -> None:
    path = tmp_path / "seg.dcm"
    path.write_bytes(encoded(make_seg(chosen.series, two_lesions)))
    assert dciodvfy(path) == []
    found = dcmqi(path, tmp_path / "dcmqi")
    assert len(found) == 2
    for lesion, image in zip(two_lesions.lesions, found, strict=True):
        theirs = np.asanyarray(image.dataobj) > 0
        places = nib.affines.apply_affine(image.affine, np.argwhere(theirs))
        # dcmqi cuts the box of the segment out of the series: compare places, voxel for voxel.
        indices = two_lesions.grid.to_index(places)
        np.testing.assert_allclose(indices, np.round(indices), atol=1e-3)
        mine = np.zeros_like(two_lesions.mask)
        mine[tuple(np.round(indices).astype(int).T)] = 1
        both = np.argwhere(mine & (two_lesions.mask > 0))
        assert len(both) == lesion.voxels == len(places), "100 % of the voxels"
        theirs_ml = theirs.sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000
        # 1e-6: a NIfTI header holds the affine in float32.
        np.testing.assert_allclose(theirs_ml, lesion.volume_ml, rtol=1e-6)


def test_a_frame_lies_on_its_source_slice(chosen: Chosen, two_lesions: Segmentation) -> None:
    made = make_seg(chosen.series, two_lesions)
    sources = {f.header.SOPInstanceUID: k for k, f in enumerate(chosen.series.frames)}
    stored = made.pixel_array
    assert made.SegmentationType == "BINARY"
    assert made.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert len(made.PerFrameFunctionalGroupsSequence) == made.NumberOfFrames == len(stored)
    for frame, group in zip(stored, made.PerFrameFunctionalGroupsSequence, strict=True):
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        k = sources[source.ReferencedSOPInstanceUID]
        place = group.PlanePositionSequence[0].ImagePositionPatient
        assert place == chosen.series.frames[k].header.ImagePositionPatient
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        lesion = two_lesions.mask[:, :, k].T > 0
        np.testing.assert_array_equal(frame > 0, lesion & ((k == 0) == (number == 2)))
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == (
        chosen.series.header.SeriesInstanceUID
    )


def test_segments_are_coded_coloured_and_named(chosen: Chosen, two_lesions: Segmentation) -> None:
    made = make_seg(chosen.series, two_lesions)
    uids = set()
    for number, item in enumerate(made.SegmentSequence, start=1):
        assert item.SegmentLabel == item.TrackingID == f"Lesion {number}"
        assert item.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
        assert item.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
        assert item.AnatomicRegionSequence[0].CodeValue == "12738006"
        assert len(item.RecommendedDisplayCIELabValue) == 3
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert item.SegmentAlgorithmName == "MoME"
        algorithm = item.SegmentationAlgorithmIdentificationSequence[0]
        assert "ab" * 32 in algorithm.AlgorithmParameters
        uids.add(item.TrackingUID)
    assert len(uids) == 2
    assert made.ContentDescription == "Research use only, not a medical device"
    assert (made.PatientName, made.PatientID) == (PATIENT_NAME, PATIENT_ID)
    assert made.BodyPartExamined == "BRAIN"


def test_one_segment_for_all(chosen: Chosen, two_lesions: Segmentation) -> None:
    made = make_seg(chosen.series, two_lesions, segments="all")
    assert [item.SegmentLabel for item in made.SegmentSequence] == ["Lesions"]
    assert int(made.pixel_array.sum()) == np.count_nonzero(two_lesions.mask)


def test_classes_become_segments(chosen: Chosen) -> None:
    mask = bright(chosen.volume).mask.copy()
    mask[16, 20, 0] = 2
    classes = ["background", "edema", "core"]
    result = Segmentation(mask, chosen.volume.affine, provenance={**PROVENANCE, "classes": classes})
    by_class = make_seg(chosen.series, result, segments="all")
    assert [item.SegmentLabel for item in by_class.SegmentSequence] == ["Edema", "Core"]
    by_lesion = make_seg(chosen.series, result)
    assert [item.SegmentLabel for item in by_lesion.SegmentSequence] == [
        *("Lesion 1 (Edema)", "Lesion 2 (Core)")
    ]


def test_an_empty_mask_gives_empty_frames_of_every_slice(
    chosen: Chosen, tmp_path: Path, dciodvfy: Callable[[Path], list[str]]
) -> None:
    empty = Segmentation(
        np.zeros_like(bright(chosen.volume).mask), chosen.volume.affine, provenance=PROVENANCE
    )
    made = make_seg(chosen.series, empty)
    assert made.NumberOfFrames == len(chosen.series.frames)
    assert not made.pixel_array.any()
    (tmp_path / "seg.dcm").write_bytes(encoded(made))
    assert dciodvfy(tmp_path / "seg.dcm") == []


def test_the_same_again_is_the_same_to_the_byte(chosen: Chosen, two_lesions: Segmentation) -> None:
    first, second = (encoded(make_seg(chosen.series, two_lesions)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "change", [{"bundle_sha256": "cd" * 32}, {"mome_sdk": "9.9.9"}, {"mirror": "all"}]
)
def test_another_model_version_or_option_gives_other_uids(
    chosen: Chosen, change: dict[str, str]
) -> None:
    ours = make_seg(chosen.series, bright(chosen.volume))
    theirs = make_seg(chosen.series, bright(chosen.volume, **change))
    assert ours.SOPInstanceUID != theirs.SOPInstanceUID
    assert ours.SeriesInstanceUID != theirs.SeriesInstanceUID


def test_threads_and_batch_give_the_same_uids(chosen: Chosen) -> None:
    ours = make_seg(chosen.series, bright(chosen.volume))
    theirs = make_seg(chosen.series, bright(chosen.volume, threads=1, batch=4))
    assert ours.SOPInstanceUID == theirs.SOPInstanceUID


def test_a_mask_of_another_grid_is_refused(chosen: Chosen) -> None:
    affine = chosen.volume.affine.copy()
    affine[0, 3] += 0.5
    with pytest.raises(GeometryError, match=r"\[geometry.foreign-source\] The mask is not on the"):
        make_seg(chosen.series, Segmentation(bright(chosen.volume).mask, affine))


def test_an_unknown_kind_of_segments_is_refused(chosen: Chosen) -> None:
    kind: Any = "blob"
    with pytest.raises(InputError, match=r"\[argument.segments\] .*lesion, all"):
        make_seg(chosen.series, bright(chosen.volume), segments=kind)


def test_headers_that_do_not_allow_it_are_one_error(chosen: Chosen) -> None:
    frames = tuple(chosen.series.frames)
    header = pydicom.Dataset(frames[0].header)
    del header.FrameOfReferenceUID
    from dataclasses import replace

    broken = replace(chosen.series, frames=tuple(replace(f, header=header) for f in frames))
    with pytest.raises(DicomError, match=r"\[dicom.build\] The SEG cannot be made"):
        make_seg(broken, bright(chosen.volume))


def test_an_enhanced_source_is_referenced_by_frame(
    tmp_path: Path,
    dciodvfy: Callable[[Path], list[str]],
    dcmqi: Callable[..., list[nib.Nifti1Image]],
) -> None:
    """Two stacks interleaved in one file; the second is the diffusion image."""
    lesion = phantom(where=grid(8.0).reorient("LPS"))
    other = Volume(np.zeros_like(lesion.array), lesion.affine)
    save([enhanced([other, lesion], "DWI", b_values=(0.0, 1000.0))], tmp_path / "in")
    chosen = read(tmp_path / "in")
    made = make_seg(chosen.series, bright(chosen.volume))
    for group in made.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        number = source.ReferencedFrameNumber
        place = chosen.series.header.PerFrameFunctionalGroupsSequence[number - 1]
        assert number % 2 == 0, "frames of the second stack"
        assert (
            place.PlanePositionSequence[0].ImagePositionPatient
            == group.PlanePositionSequence[0].ImagePositionPatient
        )
    (tmp_path / "seg.dcm").write_bytes(encoded(made))
    assert dciodvfy(tmp_path / "seg.dcm") == []
    (image,) = dcmqi(tmp_path / "seg.dcm", tmp_path / "dcmqi")
    assert np.count_nonzero(image.dataobj) == bright(chosen.volume).lesions[0].voxels
