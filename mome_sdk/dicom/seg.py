"""Segmentation -> DICOM SEG (BINARY) on the grid of the source series."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from highdicom.seg import Segmentation as SegmentationImage
from highdicom.seg import SegmentDescription
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.dicom import codes
from mome_sdk.dicom.objects import (
    ALGORITHM,
    algorithm,
    attributes,
    building,
    check_grid,
    finish,
    frame_headers,
    identity,
    slices_of,
    uid_of,
)
from mome_sdk.dicom.series import Series
from mome_sdk.errors import InputError
from mome_sdk.nifti import NOTICE
from mome_sdk.segmentation import Segmentation

# "lesion": a segment for each connected lesion; "all": one for all lesions (of a class).
Segments: TypeAlias = Literal["lesion", "all"]
SEGMENTS: tuple[Segments, ...] = get_args(Segments)


class Segment(NamedTuple):
    """One segment, named alike in the SEG and in the SR."""

    number: int
    label: str
    tracking_uid: str
    volume_ml: float


def segments_of(
    series: Series, segmentation: Segmentation, segments: Segments
) -> tuple[Segment, ...]:
    """The segments that a SEG of this result has, from number 1; none for an empty mask."""
    if segments not in SEGMENTS:
        raise InputError(
            "argument.segments",
            f"The segments are {segments!r}.",
            hint=f"They are one of: {', '.join(SEGMENTS)}.",
        )
    same = identity(series, segmentation)
    classes = list(segmentation.provenance.get("classes", ()))
    voxel_ml = segmentation.grid.voxel_ml
    if segments == "all":
        counts = np.bincount(segmentation.mask.ravel(), minlength=2)
        return tuple(
            Segment(n, _class_name(classes, n), uid_of(same, "class", n), counts[n] * voxel_ml)
            for n in range(1, len(counts))
            if counts[1:].any()
        )
    several = len(classes) > 2
    return tuple(
        Segment(
            lesion.index,
            f"Lesion {lesion.index}"
            + (f" ({_class_name(classes, lesion.label)})" if several else ""),
            uid_of(same, "lesion", lesion.index),
            lesion.volume_ml,
        )
        for lesion in segmentation.lesions
    )


def make_seg(
    series: Series, segmentation: Segmentation, *, segments: Segments = "lesion"
) -> SegmentationImage:
    """A SEG whose frames are the slices of the source that hold a lesion, voxel for voxel.

    Args:
        series: The series whose volume was segmented.
        segmentation: What was found; on the grid of the series.
        segments: "lesion" or "all".

    Returns:
        BINARY, Explicit VR Little Endian; of an empty mask one segment with all slices, all 0. The
        same arguments give the same object, UIDs and dates included.

    Raises:
        GeometryError: `geometry.foreign-source`, the mask is on another grid.
        DicomError: `dicom.build`, the headers of the series do not allow it.
    """
    check_grid(series, segmentation)
    listed = segments_of(series, segmentation, segments)
    labels: NDArray[Any] = segmentation.mask
    if segments == "lesion":
        labels, _ = _core.connected_components(np.ascontiguousarray(segmentation.mask))
    dtype = np.uint8 if len(listed) < 2**8 else np.uint16
    same = identity(series, segmentation)
    described = listed or (Segment(1, "Lesions", uid_of(same, "none"), 0.0),)
    with building("SEG"):
        made = SegmentationImage(
            source_images=frame_headers(series),
            pixel_array=slices_of(labels).astype(dtype),
            segmentation_type="BINARY",
            segment_descriptions=[_description(segment, segmentation) for segment in described],
            content_label="LESIONS",
            content_description=NOTICE,
            content_creator_name=ALGORITHM,
            omit_empty_frames=bool(listed),
            **attributes(series, segmentation, kind="SEG", position=91, description="MoME lesions"),
        )
        if series.multiframe:
            _name_source_frames(made, series)
        finish(made, series, same)
    return made


def _description(segment: Segment, segmentation: Segmentation) -> SegmentDescription:
    return SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.label,
        segmented_property_category=codes.ABNORMAL_STRUCTURE,
        segmented_property_type=codes.LESION,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm(segmentation),
        tracking_uid=segment.tracking_uid,
        tracking_id=segment.label,
        anatomic_regions=[codes.BRAIN],
        display_color=codes.colour(segment.number),
    )


def _name_source_frames(made: SegmentationImage, series: Series) -> None:
    """Name the source's frames by their numbers in its file; highdicom saw them in our order."""
    for group in made.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence") or []:
            for source in derivation.SourceImageSequence:
                index = int(np.atleast_1d(source.ReferencedFrameNumber)[0]) - 1
                source.ReferencedFrameNumber = series.frames[index].number


def _class_name(classes: list[str], number: int) -> str:
    name = classes[number] if number < len(classes) else f"class {number}"
    return "Lesions" if len(classes) <= 2 else name.capitalize()
