"""Hostile and damaged files: each is refused by name, in bounded memory and time."""

from __future__ import annotations

import io
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, config, dcmread
from pydicom.data import get_testdata_file
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import JPEG2000Lossless

from dicom_files import PATIENT_ID, PATIENT_NAME, classic, save
from mome_sdk.dicom import parse
from mome_sdk.dicom.sandbox import Limits, run_limited
from mome_sdk.dicom.series import checked_series, open_study
from mome_sdk.errors import DicomError, MomeError
from mome_sdk.volume import Grid, Volume

from .conftest import read

DEFLATED, MPEG2 = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.100"


def small(slices: int = 3, edge: int = 16) -> list[Dataset]:
    """A few slices of 16 x 16 pixels."""
    array = np.random.default_rng(0).integers(0, 1000, (edge, edge, slices)).astype(np.float32)
    grid = Grid((edge, edge, slices), np.diag((-10.0, -10.0, 10.0, 1.0)))
    return classic(Volume(array, grid.affine))


def written(folder: Path, **elements: Any) -> Path:
    """A file with other elements than it should have."""
    with config.disable_value_validation():
        (image,) = small(1)
        for keyword, value in elements.items():
            setattr(image, keyword, value)
        (path,) = save([image], folder)
    return path


def truncated(folder: Path) -> None:
    path = written(folder)
    path.write_bytes(path.read_bytes()[:700])


def cut_pixels(folder: Path) -> None:
    for path in save(small(8), folder):
        path.write_bytes(path.read_bytes()[:-100])


def with_meta(path: Path, body: bytes | None = None, **elements: str) -> None:
    """Give a file other file meta information, and another data set if one is given."""
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    meta = dcmread(path).file_meta
    for keyword, value in elements.items():
        setattr(meta, keyword, value)
    stream = io.BytesIO()
    write_file_meta_info(stream, meta)
    path.write_bytes(data[:132] + stream.getvalue() + (data[start:] if body is None else body))


def deflate_bomb(folder: Path) -> None:
    """A private element of 2 GiB of zeros, in 2 MB."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = deflater.compress(struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 2**31))
    start += deflater.flush(zlib.Z_FULL_FLUSH)
    zeros = deflater.compress(bytes(2**24)) + deflater.flush(zlib.Z_FULL_FLUSH)
    with_meta(written(folder), start + 128 * zeros + deflater.flush(), TransferSyntaxUID=DEFLATED)


def nested(folder: Path) -> None:
    """2,000 sequences, each in an item of the one before, all without a length."""
    path = written(folder)
    data = path.read_bytes()
    opened = struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF)
    opened += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closed = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    pixels = data.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    path.write_bytes(data[:pixels] + 2000 * opened + 2000 * closed + data[pixels:])


def zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(2**26))


def lying_zip(folder: Path) -> None:
    """A zip file whose directory announces fewer bytes than there are."""
    path = folder / "study.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(2**20))
    size = struct.pack("<I", 2**20)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 1000)))


def no_zip(folder: Path) -> None:
    (folder / "study.zip").write_bytes(b"PK\x03\x04 and then nothing of a zip file")


def foreign_class(folder: Path) -> None:
    """The meta information says MR, the data set CT."""
    path = written(folder, SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    with_meta(path, MediaStorageSOPClassUID="1.2.840.10008.5.1.4.1.1.4")


def video(folder: Path) -> None:
    with_meta(written(folder), TransferSyntaxUID=MPEG2)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated header": (truncated, "dicom.damaged", "File 1 of 1: it has no SeriesInstanceUID"),
    "truncated pixels": (cut_pixels, "dicom.damaged", "Image 1 of 8 cannot be read as DICOM"),
    "deflate bomb": (deflate_bomb, "dicom.deflated", "its data set is deflated"),
    "nested": (nested, "dicom.damaged", "(RecursionError)"),
    "zip bomb": (zip_bomb, "dicom.limit-zip", "announces more"),
    "lying zip": (lying_zip, "dicom.zip", "cannot be unpacked (BadZipFile)"),
    "no zip": (no_zip, "dicom.zip", "cannot be unpacked (BadZipFile)"),
    "path as UID": (
        lambda folder: written(folder, StudyInstanceUID="../../../../etc/passwd"),
        *("dicom.uid", "its StudyInstanceUID is no UID"),
    ),
    "huge": (
        lambda folder: written(folder, Rows=65535, Columns=65535),
        *("dicom.limit-edge", "65535 x 65535 pixels; at most 4096 x 4096"),
    ),
}
DAMAGED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "foreign class": (foreign_class, "dicom.damaged", "different kinds of image"),
    "video": (video, "dicom.transfer-syntax", "its transfer syntax is MPEG2"),
    "long UID": (
        lambda folder: written(folder, SeriesInstanceUID="1." * 40 + "1"),
        *("dicom.uid", "its SeriesInstanceUID is no UID"),
    ),
    "path as place": (
        lambda folder: written(folder, FrameOfReferenceUID="a/b"),
        *("dicom.uid", "its FrameOfReferenceUID is no UID"),
    ),
    "many frames": (
        lambda folder: written(folder, NumberOfFrames="1000000"),
        *("dicom.limit-frames", "1000000 frames; at most 20000"),
    ),
    "many voxels": (
        lambda folder: written(folder, Rows=4096, Columns=4096, NumberOfFrames="100"),
        *("dicom.limit-voxels", "1677721600 pixels"),
    ),
    "no rows": (
        lambda folder: written(folder, Rows=0),
        *("dicom.pixels", "announces 1 frames of 0 x 16 pixels"),
    ),
    "colour": (
        lambda folder: written(folder, SamplesPerPixel=3),
        *("dicom.pixels", "3 samples of 16 bits"),
    ),
    "long text": (
        lambda folder: written(folder, SeriesDescription="x" * 5000),
        *("dicom.limit-depth", "an element has 5000 characters"),
    ),
    "many values": (
        lambda folder: written(folder, ImageType=["X"] * 1000),
        *("dicom.limit-depth", "an element has 1000 values"),
    ),
    "no number": (
        lambda folder: written(folder, EchoTime="nan"),
        *("dicom.damaged", "cannot be read as DICOM (ValueError)"),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, code, text = HOSTILE[case]
    make(tmp_path)
    archive = tmp_path / "study.zip"
    start = time.perf_counter()
    check_refusal(archive if archive.exists() else tmp_path, code, text)
    assert time.perf_counter() - start < 20, "nothing was unpacked or tried for long"
    assert capfd.readouterr() == ("", ""), "warnings quote values"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    make, code, text = DAMAGED[case]
    make(tmp_path)
    check_refusal(tmp_path, code, text)


def check_refusal(source: Path, code: str, text: str) -> None:
    with pytest.raises(DicomError) as caught:
        read(source)
    assert caught.value.code == code
    assert text in caught.value.message
    assert caught.value.hint
    for secret in (PATIENT_NAME, "Zora", PATIENT_ID, "passwd", str(source)):
        assert secret not in str(caught.value)


def test_a_bomb_in_compressed_pixels_takes_no_more_than_the_limit(tmp_path: Path) -> None:
    """A JPEG 2000 image of 60,000 x 60,000 pixels behind a header of 64 x 64."""
    images = small(8, edge=64)
    save(images, tmp_path / "native")
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "native").iterdir():
        image = dcmread(path)
        image.compress(JPEG2000Lossless, generate_instance_uid=False)
        marker = image.PixelData.index(b"\xff\x51") + 6  # SIZ: width and height follow
        image.PixelData = (
            image.PixelData[:marker]
            + struct.pack(">II", 60000, 60000)
            + image.PixelData[marker + 8 :]
        )
        image.save_as(tmp_path / "in" / path.name)
    start = time.perf_counter()
    with pytest.raises(DicomError) as caught:
        read(tmp_path / "in")
    assert time.perf_counter() - start < 20
    assert caught.value.code in (
        "dicom.damaged",
        "dicom.pixels",
        "dicom.limit-memory",
        "dicom.crashed",
    )


def test_bounds_are_the_callers(tmp_path: Path) -> None:
    save(small(3), tmp_path / "in")
    for limits, code in (
        (Limits(files=2), "dicom.limit-files"),
        (Limits(file_bytes=500), "dicom.limit-size"),
        (Limits(total_bytes=3000), "dicom.limit-size"),
        (Limits(edge=8), "dicom.limit-edge"),
        (Limits(seconds=0.001), "dicom.limit-time"),
    ):
        with pytest.raises(DicomError) as caught, open_study(tmp_path / "in", limits=limits):
            pass
        assert caught.value.code == code
    with open_study(tmp_path / "in", limits=Limits(voxels=300)) as study:
        series = checked_series(study.stacks[0], modality="FLAIR", reasons=())
        with pytest.raises(DicomError, match=r"\[dicom.limit-voxels\] Series 1"):
            study.volume(series)


def test_a_zip_file_is_bounded_by_entries_and_sizes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"../../{number}", bytes(600))
    for limits, code in (
        (Limits(files=3), "dicom.limit-files"),
        (Limits(file_bytes=500), "dicom.limit-size"),
        (Limits(), "dicom.no-image"),
    ):
        with pytest.raises(DicomError) as caught, open_study(tmp_path / "a.zip", limits=limits):
            pass
        assert caught.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"], "no entry climbed out"


def test_a_process_that_ends_by_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match=r"\[dicom.crashed\] The process that reads the files"):
        run_limited("no such task", tmp_path, Limits())


def outcome(files: list[Path]) -> str:
    """The code of the error, or "read"; anything but a MomeError comes through."""
    try:
        with open_study(files) as study:
            for part in study.stacks:
                study.volume(checked_series(part, modality="FLAIR", reasons=()))
    except MomeError as error:
        return "said too much" if PATIENT_ID in str(error) else error.code
    return "read"


def mutants(folder: Path, count: int) -> Iterator[list[Path]]:
    """Three files, one of them with some bytes of its header changed, cut out or doubled."""
    paths = save(small(3), folder)
    whole = paths[1].read_bytes()
    random = np.random.default_rng(1)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 6))):
            place = int(random.integers(132, len(data) - 512))
            kind = int(random.integers(4))
            if kind == 0:
                data[place] = int(random.integers(256))
            elif kind == 1:
                data[place : place + 4] = random.bytes(4)
            elif kind == 2:
                del data[place : place + int(random.integers(1, 20))]
            else:
                data[place:place] = data[place : place + int(random.integers(1, 20))]
        paths[1].write_bytes(data)
        yield paths


def check_mutants(folder: Path, count: int) -> None:
    seen: dict[str, int] = {}
    for files in mutants(folder, count):
        start = time.perf_counter()
        code = outcome(files)
        assert time.perf_counter() - start < 5
        seen[code] = seen.get(code, 0) + 1
    print(dict(sorted(seen.items(), key=lambda item: -item[1])))
    assert "said too much" not in seen
    assert seen["read"] > count / 50, "changes of what is not used"
    assert seen["dicom.damaged"] > count / 20


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore")  # in its own process their text goes nowhere
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    check_mutants(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore")
def test_3000_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    check_mutants(tmp_path, 3000)


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"),
    ],
)
def test_a_scanners_own_image_is_the_same_in_every_transfer_syntax(
    name: str, tmp_path: Path
) -> None:
    """A real slice that pydicom brings, stored in several ways."""
    known = dcmread(str(get_testdata_file("MR_small.dcm"))).pixel_array
    path = str(get_testdata_file(name))
    found = parse.scan(files=[path], archive=None, limits=Limits())
    assert len(found["instances"]) == 1
    output = tmp_path / "pixels.f32"
    size = {"rows": 64, "columns": 64, "output": str(output)}
    parse.decode(frames=[[path, 1, 1.0, 0.0]], limits=Limits(), **size)
    np.testing.assert_array_equal(np.fromfile(output, "<f4").reshape(64, 64), known)


def test_a_scanners_own_image_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = str(get_testdata_file("MR_truncated.dcm"))
    size = {"rows": 64, "columns": 64, "output": str(tmp_path / "pixels.f32")}
    with pytest.raises(DicomError, match=r"\[dicom.damaged\] Image 1 of 1"):
        parse.decode(frames=[[path, 1, 1.0, 0.0]], limits=Limits(), **size)
