"""DICOM SR, TID 1500: what other programs read in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from highdicom.sr import EnhancedSR

from dicom_files import PATIENT_NAME
from mome_sdk.dicom.objects import encoded
from mome_sdk.dicom.report import make_report
from mome_sdk.dicom.seg import make_seg
from mome_sdk.segmentation import Segmentation
from mome_sdk.study import Chosen

from .conftest import PROVENANCE, bright


@pytest.fixture(scope="module")
def two_lesions(chosen: Chosen) -> Segmentation:
    mask = bright(chosen.volume).mask.copy()
    mask[16, 20, 0] = 1
    return Segmentation(mask, chosen.volume.affine, provenance=PROVENANCE)


@pytest.fixture(scope="session")
def tid1500reader() -> Callable[[Path], list[dict[str, object]]]:
    """A function: the measurement groups of an SR as dcmqi reads them."""
    program = Path(sys.executable).with_name("tid1500reader")
    if not program.exists():
        pytest.skip('dcmqi is not installed: pip install "mome-sdk[test]".')

    def judge(path: Path) -> list[dict[str, object]]:
        out = path.with_suffix(".json")
        command = [program, "--inputDICOM", path, "--outputMetadata", out]
        subprocess.run(command, capture_output=True, check=True)
        groups: list[dict[str, object]] = json.loads(out.read_text())["Measurements"]
        return groups

    return judge


def test_other_programs_read_the_volumes(
    chosen: Chosen,
    two_lesions: Segmentation,
    tmp_path: Path,
    dciodvfy: Callable[[Path], list[str]],
    tid1500reader: Callable[..., list[dict[str, object]]],
) -> None:
    seg = make_seg(chosen.series, two_lesions)
    path = tmp_path / "sr.dcm"
    path.write_bytes(encoded(make_report(chosen.series, two_lesions, seg=seg)))
    assert dciodvfy(path) == []
    groups = tid1500reader(path)
    segments = [group for group in groups if "ReferencedSegment" in group]
    assert len(segments) == 2
    for lesion, group, item in zip(two_lesions.lesions, segments, seg.SegmentSequence, strict=True):
        assert group["TrackingUniqueIdentifier"] == item.TrackingUID
        assert group["ReferencedSegment"] == item.SegmentNumber == lesion.index
        assert group["segmentationSOPInstanceUID"] == seg.SOPInstanceUID
        (number,) = group["measurementItems"]  # type: ignore[misc]
        assert number["units"]["CodeValue"] == "mL"  # type: ignore[has-type]
        np.testing.assert_allclose(
            float(number["value"]),  # type: ignore[has-type]
            lesion.volume_ml,
            rtol=1e-6,
        )


def numbers(report: EnhancedSR) -> list[tuple[str, float, str]]:
    """Every number of a report: name, value, unit."""
    found = []
    stack = list(report.ContentSequence)
    while stack:
        item = stack.pop(0)
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0]
            unit = value.MeasurementUnitsCodeSequence[0].CodeValue
            name = item.ConceptNameCodeSequence[0].CodeMeaning
            found.append((name, float(value.NumericValue), unit))
        stack += list(item.get("ContentSequence") or [])
    return found


def test_the_last_group_has_total_and_count(chosen: Chosen, two_lesions: Segmentation) -> None:
    report = make_report(chosen.series, two_lesions)
    found = numbers(report)
    assert ("Number of lesions", 2.0, "1") in found
    total = [value for name, value, _ in found if name == "Volume"]
    np.testing.assert_allclose(total[:2], [x.volume_ml for x in two_lesions.lesions], rtol=1e-6)
    np.testing.assert_allclose(total[2], two_lesions.volume_ml, rtol=1e-6)
    assert report.PatientName == PATIENT_NAME
    assert report.CompletionFlag == "COMPLETE"
    assert report.VerificationFlag == "UNVERIFIED"


def test_an_empty_mask_gives_a_count_of_0(
    chosen: Chosen, tmp_path: Path, dciodvfy: Callable[[Path], list[str]]
) -> None:
    mask = np.zeros(chosen.volume.array.shape, np.uint8)
    empty = Segmentation(mask, chosen.volume.affine, provenance=PROVENANCE)
    report = make_report(chosen.series, empty)
    assert numbers(report) == [("Number of lesions", 0.0, "1"), ("Volume", 0.0, "mL")]
    (tmp_path / "sr.dcm").write_bytes(encoded(report))
    assert dciodvfy(tmp_path / "sr.dcm") == []


def test_without_a_seg_no_segment_is_referenced(
    chosen: Chosen, two_lesions: Segmentation, tmp_path: Path, dciodvfy: Callable[..., list[str]]
) -> None:
    (tmp_path / "sr.dcm").write_bytes(encoded(make_report(chosen.series, two_lesions)))
    assert dciodvfy(tmp_path / "sr.dcm") == []
    assert b"1.2.840.10008.5.1.4.1.1.66.4" not in (tmp_path / "sr.dcm").read_bytes()


def test_dcmtk_prints_the_notice_and_the_model(
    chosen: Chosen,
    two_lesions: Segmentation,
    tmp_path: Path,
    require_program: Callable[[str], Path],
) -> None:
    path = tmp_path / "sr.dcm"
    path.write_bytes(encoded(make_report(chosen.series, two_lesions)))
    command = [require_program("dsrdump"), "+Pl", path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "notice=Research use only, not a medical device" in said
    assert f"sha256={'ab' * 32}" in said


def test_the_same_again_is_the_same_to_the_byte(chosen: Chosen, two_lesions: Segmentation) -> None:
    seg = make_seg(chosen.series, two_lesions)
    first, second = (encoded(make_report(chosen.series, two_lesions, seg=seg)) for _ in range(2))
    assert first == second
