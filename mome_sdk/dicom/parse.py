"""The tasks of run_limited: headers and pixels out of DICOM files, in a process of their own.

A file is looked at in this order, so that nothing is unpacked or allocated on its word alone: the
magic, the file meta information, the transfer syntax, the data set without pixels, the sizes, and
only for a series that was chosen the pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, config, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.pixels.utils import iter_pixels
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag
from pydicom.uid import UID

from mome_sdk.dicom.sandbox import Limits
from mome_sdk.errors import DicomError

CLASSIC = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED = ("1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")  # and Legacy Converted
IMAGES = (CLASSIC, *ENHANCED)

# Everything that is not deflated or video. Deflated data sets (1.2.840.10008.1.2.1.99) are
# unpacked whole by every reader, before any element can be looked at: 1 MB becomes 3 GB.
SYNTAXES = {
    *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"),
    *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)),
}
_DEFLATED = {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}

# The elements that are used for something; no others leave this process.
_KEPT = (
    # Who and when: repeated in the results.
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("PatientAge", "PatientSize", "PatientWeight", "StudyInstanceUID", "StudyID", "StudyDate"),
    *("StudyTime", "StudyDescription", "AccessionNumber", "ReferringPhysicianName"),
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("PositionReferenceIndicator", "SeriesDate", "SeriesTime", "AcquisitionDate"),
    *("AcquisitionTime", "ContentDate", "ContentTime", "InstanceNumber", "SeriesNumber"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    # What was acquired.
    *("Modality", "ImageType", "FrameType", "ScanningSequence", "SequenceVariant", "SequenceName"),
    *("MRAcquisitionType", "EchoPulseSequence", "EchoPlanarPulseSequence", "EchoTime"),
    *("EffectiveEchoTime", "RepetitionTime", "InversionTime", "InversionTimes", "FlipAngle"),
    *("AcquisitionContrast", "ComplexImageComponent", "ContrastBolusAgent", "ContrastBolusVolume"),
    *("ContrastBolusAgentSequence", "CodeValue", "DiffusionBValue", "DiffusionDirectionality"),
    *("DiffusionGradientOrientation", "SeriesDescription", "ProtocolName", "BodyPartExamined"),
    *("MREchoSequence", "MRTimingAndRelatedParametersSequence", "MRModifierSequence"),
    *("MRImageFrameTypeSequence", "MRDiffusionSequence", "DiffusionGradientDirectionSequence"),
    # Where the voxels are.
    *("Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "ImageOrientationPatient", "ImagePositionPatient"),
    *("ImagesInAcquisition", "TemporalPositionIdentifier", "TemporalPositionIndex", "StackID"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("PlaneOrientationSequence", "PlanePositionSequence", "PixelMeasuresSequence"),
    *("FrameContentSequence", "PixelValueTransformationSequence"),
    # What they hold.
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored"),
    *("PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
)
# Where vendors put the b-value: creator's element, its text, the element.
_PRIVATE_B = (
    (0x00190010, "SIEMENS MR HEADER", 0x0019100C),
    (0x00430010, "GEMS_PARM_01", 0x00431039),
    (0x20010010, "Philips Imaging DD 001", 0x20011003),
)
_UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_NUMBERS = ("DS", "IS", "FD", "FL", "US", "SS", "UL", "SL")
_MOST_TEXT = 1024
_MOST_VALUES = 64
_MOST_DEPTH = 4

Elements = list[list[Any]]


def main() -> None:
    """Do the task that standard input asks for; answer on standard output. One JSON object each."""
    request = json.load(sys.stdin)
    limits = Limits(**request.pop("limits"))
    _bound(limits)
    config.settings.reading_validation_mode = config.IGNORE
    answer: dict[str, Any]
    try:
        answer = TASKS[request.pop("task")](limits=limits, **request)
    except DicomError as error:
        answer = {"error": [error.code, error.message, error.hint]}
    except MemoryError:
        answer = {
            "error": [
                "dicom.limit-memory",
                f"Reading the files takes more than {limits.memory_bytes / 2**20:.0f} MiB.",
                "A file is damaged or hostile, or larger than what is read here.",
            ]
        }
    json.dump(answer, sys.stdout, allow_nan=False)


def scan(*, files: Sequence[str], archive: str | None, limits: Limits) -> dict[str, Any]:
    """The headers of MR images.

    Args:
        files: Their paths.
        archive: A zip file to read instead; its members are unpacked to the working folder.
        limits: Bounds.

    Returns:
        "instances": [{"path", "elements"}], "others": how many files hold no MR image.
    """
    if archive is not None:
        files = _unpacked(Path(archive), limits)
    if len(files) > limits.files:
        raise _over("files", f"There are {len(files)} files", f"{limits.files}")
    instances, others, total = [], 0, 0
    for number, path in enumerate(map(Path, files), start=1):
        with _explained(f"File {number} of {len(files)}"):
            elements = _header(path, limits)
            total += path.stat().st_size if elements is not None else 0
        if total > limits.total_bytes:
            raise _over("size", "The images are larger", f"{limits.total_bytes} bytes together")
        if elements is None:
            others += 1
        else:
            instances.append({"path": str(path), "elements": elements})
    return {"instances": instances, "others": others}


def decode(
    *, frames: Sequence[Sequence[Any]], rows: int, columns: int, output: str, limits: Limits
) -> dict[str, Any]:
    """Write frames (K, rows, columns) as little-endian float32 to the file `output`.

    Args:
        frames: [path, number of the frame (1 for the first), slope, intercept], in the order that
            they are written in; frames of one file stand together.
        rows, columns: Size of every one; another one is an error.
        output: A file that does not exist yet, in the working folder.
        limits: Bounds.
    """
    if len(frames) * rows * columns > limits.voxels:
        raise _over("voxels", f"The series has {len(frames) * rows * columns} voxels", "512 Mi")
    done = 0
    with Path(output).open("xb") as stream:
        for path, group in itertools.groupby(frames, lambda frame: frame[0]):
            wanted = list(group)
            with _explained(f"Image {done + 1} of {len(frames)}"):
                for pixels, (_, _, slope, intercept) in zip(
                    _pixels(Path(path), [frame[1] for frame in wanted], rows, columns),
                    wanted,
                    strict=True,
                ):
                    values = pixels.astype(np.float64) * slope + intercept
                    stream.write(values.astype("<f4").tobytes())
                    done += 1
    return {"frames": done}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"scan": scan, "decode": decode}


def _bound(limits: Limits) -> None:
    """Let the system hold the bounds: address space, processor time, size of files, no dumps."""
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_FSIZE, max(limits.file_bytes, 4 * limits.voxels)),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (bound, bound))


@contextlib.contextmanager
def _explained(about: str) -> Iterator[None]:
    """Make one DicomError of whatever a file leads to.

    Damaged files raise half a dozen classes in pydicom, AttributeError and TypeError among them.
    Their texts are left out: they quote values.
    """
    try:
        yield
    except DicomError as error:
        text = f"{about}: {error.message}"
        raise DicomError(error.code, text, hint=error.hint) from error
    except MemoryError:
        raise
    except Exception as error:
        raise DicomError(
            "dicom.damaged",
            f"{about} cannot be read as DICOM ({type(error).__name__}).",
            hint="The file is cut off or damaged: send or copy it again, or leave it out.",
        ) from error


def _over(what: str, found: str, most: str) -> DicomError:
    return DicomError(
        f"dicom.limit-{what}",
        f"{found}; at most {most} are read.",
        hint="No MR series needs more: the file is damaged or hostile, or was named by mistake.",
    )


def _unpacked(archive: Path, limits: Limits) -> list[str]:
    """The members of a zip file, as files of the working folder named by number.

    Their own names, which may climb out of a folder or name a patient, are not used.
    """
    try:
        with zipfile.ZipFile(archive) as members:
            infos = [info for info in members.infolist() if not info.is_dir()]
            if len(infos) > limits.files:
                raise _over("files", f"The zip file has {len(infos)} entries", f"{limits.files}")
            most = min(limits.total_bytes, limits.zip_ratio * archive.stat().st_size)
            if sum(info.file_size for info in infos) > most:
                raise _over("zip", "The zip file announces more", f"{most} bytes for its size")
            return [str(_member(members, info, n, limits)) for n, info in enumerate(infos)]
    except DicomError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise DicomError(
            "dicom.zip",
            f"The zip file cannot be unpacked ({type(error).__name__}).",
            hint="A whole zip file without a password is expected: pack or copy it again.",
        ) from error


def _member(members: zipfile.ZipFile, info: zipfile.ZipInfo, number: int, limits: Limits) -> Path:
    """One member as a file; its true size is what the directory says, or it is refused."""
    if info.file_size > limits.file_bytes:
        raise _over("size", f"Entry {number + 1} is {info.file_size} bytes", f"{limits.file_bytes}")
    path = Path(f"{number + 1:06d}")
    left = info.file_size
    with members.open(info) as source, path.open("xb") as target:
        while block := source.read(min(2**20, left + 1)):
            left -= len(block)
            if left < 0:
                raise _over("zip", f"Entry {number + 1} unpacks to more", "what it announces")
            target.write(block)
    return path


def _header(path: Path, limits: Limits) -> Elements | None:
    """The elements of an MR image; None for a file that holds none."""
    syntax_ok = _checked_meta(path)
    if syntax_ok is None:
        return None
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise _over("size", f"it has {size} bytes", f"{limits.file_bytes}")
    dataset = dcmread(path, stop_before_pixels=True, specific_tags=[*_TAGS, *_PRIVATE_TAGS])
    if dataset.get("SOPClassUID") != syntax_ok:
        raise DicomError(
            "dicom.damaged",
            "its header and its file meta information name different kinds of image.",
            hint="The file is damaged: send it again.",
        )
    _check_uids(dataset)
    _check_sizes(dataset, limits)
    _take_private_b_value(dataset)
    return _elements(dataset, limits)


def _checked_meta(path: Path) -> str | None:
    """The SOP class of an MR image whose transfer syntax is read; None for every other file."""
    with path.open("rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return None
    meta = read_file_meta_info(path)
    kind = str(meta.MediaStorageSOPClassUID)
    if kind != CLASSIC and kind not in ENHANCED:
        return None
    syntax = str(meta.TransferSyntaxUID)
    if syntax in _DEFLATED:
        raise DicomError(
            "dicom.deflated",
            "its data set is deflated, which can unpack to a thousand times its size.",
            hint="Send it in another transfer syntax, such as Explicit VR Little Endian.",
        )
    if syntax not in SYNTAXES:
        raise DicomError(
            "dicom.transfer-syntax",
            f"its transfer syntax is {UID(syntax).name if _is_uid(syntax) else 'no UID'}.",
            hint="Native, RLE, JPEG, JPEG-LS and JPEG 2000 images are read.",
        )
    return kind


def _is_uid(text: object) -> bool:
    return re.fullmatch(r"[0-9.]{1,64}", str(text)) is not None


def _check_uids(dataset: Dataset) -> None:
    named = [*_UIDS, *(name for name in ("FrameOfReferenceUID",) if dataset.get(name))]
    for name in named:
        if not dataset.get(name):
            raise DicomError(
                "dicom.damaged",
                f"it has no {name}.",
                hint="The file is cut off or damaged: send or copy it again, or leave it out.",
            )
        if not _is_uid(dataset[name].value):
            raise DicomError(
                "dicom.uid",
                f"its {name} is no UID.",
                hint="1 to 64 digits and full stops are expected: the file is damaged or hostile.",
            )


def _check_sizes(dataset: Dataset, limits: Limits) -> None:
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if rows > limits.edge or columns > limits.edge:
        raise _over("edge", f"it has {rows} x {columns} pixels", f"{limits.edge} x {limits.edge}")
    if frames > limits.frames:
        raise _over("frames", f"it has {frames} frames", f"{limits.frames}")
    if rows * columns * frames > limits.voxels:
        raise _over("voxels", f"it has {rows * columns * frames} pixels", f"{limits.voxels}")
    if rows < 1 or columns < 1 or frames < 1:
        raise DicomError(
            "dicom.pixels",
            f"it announces {frames} frames of {rows} x {columns} pixels.",
            hint="An image is expected: the file is damaged.",
        )
    samples, bits = int(dataset.get("SamplesPerPixel") or 0), int(dataset.get("BitsAllocated") or 0)
    if (
        samples != 1
        or bits not in (8, 16)
        or dataset.get("PhotometricInterpretation")
        not in (
            "MONOCHROME1",
            "MONOCHROME2",
        )
    ):
        raise DicomError(
            "dicom.pixels",
            f"its pixels have {samples} samples of {bits} bits, or are no grey values.",
            hint="Grey values of 8 or 16 bits are expected: leave out screenshots and colour maps.",
        )


def _take_private_b_value(dataset: Dataset) -> None:
    """Put a vendor's own b-value (s/mm^2) in the standard element, where that is missing."""
    standard = dataset.get("DiffusionBValue")
    for creator_tag, creator, tag in _PRIVATE_B:
        known = str(dataset.get(Tag(creator_tag)).value) if Tag(creator_tag) in dataset else ""
        if standard is None and known.strip() == creator and Tag(tag) in dataset:
            value = _first_number(dataset[Tag(tag)].value)
            if value is not None:
                # GE adds multiples of 1e5 and more as flags.
                dataset.DiffusionBValue = value % 100_000


def _first_number(value: Any) -> float | None:
    """The first number of an element, which has no type where its creator is not known."""
    if isinstance(value, bytes) and len(value) in (4, 8) and not value.strip(b"\0 ").isdigit():
        return float(np.frombuffer(value, "<f4" if len(value) == 4 else "<f8")[0])
    if isinstance(value, bytes):
        value = value.decode("ascii").strip("\0 ").split("\\")
    if isinstance(value, MultiValue | list):
        value = value[0] if value else None
    return None if value in (None, "") else float(value)


def _elements(dataset: Dataset, limits: Limits, depth: int = 0) -> Elements:
    """The elements that are kept, as [tag, VR, value] with JSON values."""
    found: Elements = []
    for tag in sorted(_TAGS.intersection(dataset.keys())):
        element = dataset[tag]
        if dictionary_VR(tag) != element.VR:
            raise TypeError("the element has another type than the standard gives it")
        if isinstance(element.value, Items):
            most = limits.frames if depth == 0 else _MOST_VALUES
            if depth == _MOST_DEPTH or len(element.value) > most:
                raise _over("depth", "its sequences are deeper or longer", f"{most} items")
            value: Any = [_elements(item, limits, depth + 1) for item in element.value]
        else:
            value = _json_value(element.value, number=element.VR in _NUMBERS)
            if int(tag) in _NAMES and "\ufffd" in str(value):
                raise ValueError("a text in the character set that the header names is expected")
        found.append([int(tag), str(element.VR), value])
    return found


def _json_value(value: Any, *, number: bool) -> Any:
    if isinstance(value, MultiValue | list):
        if len(value) > _MOST_VALUES:
            raise _over("depth", f"an element has {len(value)} values", f"{_MOST_VALUES}")
        return [_json_value(part, number=number) for part in value]
    if value is None or value == "":
        return ""
    if number and not isinstance(value, int | float):
        raise TypeError("a number is expected")
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ValueError("a number is expected")
    if type(value) in (int, float):
        return value
    if isinstance(value, bytes):
        raise TypeError("text is expected")
    text = str(value)
    if len(text) > _MOST_TEXT:
        raise _over("depth", f"an element has {len(text)} characters", f"{_MOST_TEXT}")
    return text


def _pixels(
    path: Path, numbers: Sequence[int], rows: int, columns: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Stored values (rows, columns) of frames of a file, one after the other."""
    _checked_meta(path)
    indices = [number - 1 for number in numbers]
    for pixels in iter_pixels(path, indices=indices, raw=True):
        if pixels.shape != (rows, columns) or pixels.dtype.kind not in "iu":
            raise DicomError(
                "dicom.pixels",
                f"its pixels are {pixels.dtype} of shape {pixels.shape}.",
                hint=f"Integers of shape {(rows, columns)} are expected: the file is damaged.",
            )
        yield pixels


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return tag


# What a result must not repeat wrongly.
_NAMES = {_tag("PatientName"), _tag("PatientID")}
_TAGS = {Tag(_tag(keyword)) for keyword in _KEPT}
_PRIVATE_TAGS = [Tag(tag) for creator, _, tag in _PRIVATE_B for tag in (creator, tag)]
