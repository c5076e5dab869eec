"""Segmentation -> DICOM SR, TID 1500: volume of each lesion, total, count."""

from __future__ import annotations

from typing import Any

from highdicom.seg import Segmentation as SegmentationImage
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    ReferencedSegment,
    SourceSeriesForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from mome_sdk.dicom import codes
from mome_sdk.dicom.objects import (
    ALGORITHM,
    MANUFACTURER,
    attributes,
    building,
    check_grid,
    finish,
    frame_headers,
    identity,
    model_sha256,
    parameters,
    uid_of,
)
from mome_sdk.dicom.seg import Segment, Segments, segments_of
from mome_sdk.dicom.series import Series
from mome_sdk.segmentation import Segmentation


def make_report(
    series: Series,
    segmentation: Segmentation,
    *,
    seg: SegmentationImage | None = None,
    segments: Segments = "lesion",
) -> EnhancedSR:
    """A structured report of what was found.

    Args:
        series: The series whose volume was segmented.
        segmentation: What was found; on the grid of the series.
        seg: The SEG of the same result, made with the same `segments`: its segments are referenced.
            Without it the volumes stand alone.
        segments: "lesion" or "all".

    Returns:
        Enhanced SR with a TID 1500 measurement report: a group with the volume (mL) of each
        segment, and one with the total volume and the number of lesions, which is 0 for an empty
        mask. Tracking identifiers are those of the SEG. The same arguments give the same object.

    Raises:
        GeometryError: `geometry.foreign-source`, the mask is on another grid.
        DicomError: `dicom.build`, the headers of the series do not allow it.
    """
    check_grid(series, segmentation)
    same = identity(series, segmentation)
    listed = segments_of(series, segmentation, segments)
    with building("SR"):
        headers = frame_headers(series)
        groups = [_lesion_group(segment, series, segmentation, seg) for segment in listed]
        content = MeasurementReport(
            observation_context=_observer(segmentation),
            procedure_reported=codes.MR_HEAD,
            imaging_measurements=[*groups, _total_group(same, segmentation)],
        )
        evidence: list[Dataset] = [*([seg] if seg is not None else []), *headers]
        made = EnhancedSR(
            evidence=evidence,
            content=content[0],
            is_complete=True,
            is_final=False,
            **attributes(
                series, segmentation, kind="SR", position=92, description="MoME lesion report"
            ),
        )
        finish(made, series, same)
    return made


def _observer(segmentation: Segmentation) -> ObservationContext:
    device = DeviceObserverIdentifyingAttributes(
        uid=uid_of(model_sha256(segmentation), "device"),
        name=ALGORITHM,
        manufacturer_name=MANUFACTURER,
        model_name=ALGORITHM,
        serial_number=model_sha256(segmentation)[:16] or None,
    )
    return ObservationContext(
        observer_device_context=ObserverContext(
            observer_type=CodedConcept.from_code(codes.DEVICE),
            observer_identifying_attributes=device,
        )
    )


def _lesion_group(
    segment: Segment, series: Series, segmentation: Segmentation, seg: SegmentationImage | None
) -> VolumetricROIMeasurementsAndQualitativeEvaluations | MeasurementsAndQualitativeEvaluations:
    """The volume of one segment; with a reference to it where there is a SEG."""
    common: dict[str, Any] = {
        "tracking_identifier": TrackingIdentifier(segment.tracking_uid, segment.label),
        "finding_type": codes.LESION,
        "finding_category": codes.ABNORMAL_STRUCTURE,
        "finding_sites": [FindingSite(codes.BRAIN)],
        "algorithm_id": _algorithm(segmentation),
        "measurements": [_number(codes.VOLUME, segment.volume_ml, codes.MILLILITRE)],
    }
    if seg is None:
        return MeasurementsAndQualitativeEvaluations(**common)
    reference = ReferencedSegment(
        sop_class_uid=SegmentationStorage,
        sop_instance_uid=seg.SOPInstanceUID,
        segment_number=segment.number,
        source_series=SourceSeriesForSegmentation(series.header.SeriesInstanceUID),
    )
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=reference, **common
    )


def _total_group(same: str, segmentation: Segmentation) -> MeasurementsAndQualitativeEvaluations:
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid_of(same, "total"), "All lesions"),
        finding_type=codes.LESION,
        finding_category=codes.ABNORMAL_STRUCTURE,
        finding_sites=[FindingSite(codes.BRAIN)],
        algorithm_id=_algorithm(segmentation),
        measurements=[
            _number(codes.LESION_COUNT, len(segmentation.lesions), codes.NO_UNITS),
            _number(codes.VOLUME, segmentation.volume_ml, codes.MILLILITRE, codes.TOTAL),
        ],
    )


def _number(name: Code, value: float, unit: Code, derivation: Code | None = None) -> Measurement:
    # A decimal string has room for 9 digits whatever the exponent.
    return Measurement(name=name, value=float(f"{value:.9g}"), unit=unit, derivation=derivation)


def _algorithm(segmentation: Segmentation) -> AlgorithmIdentification:
    return AlgorithmIdentification(
        name=ALGORITHM,
        version=str(segmentation.provenance.get("mome_sdk", "")),
        parameters=[f"{name}={value}" for name, value in parameters(segmentation).items()],
    )
