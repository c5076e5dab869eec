"""NIfTI in and out: the place of the voxels survives, and damaged files are named."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mome_sdk.errors import GeometryError, InputError
from mome_sdk.nifti import NOTICE, Source, open_nifti, read_nifti, volume_of, write_nifti
from mome_sdk.volume import Volume

AFFINE = np.array(
    [[-2.0, 0.1, 0.0, 90.5], [0.1, 2.0, 0.0, -126.25], [0.0, 0.0, 3.0, -72.0], [0, 0, 0, 1.0]]
)
VOXELS = np.arange(120, dtype=np.int16).reshape(4, 5, 6)


def damaged(path: Path, kind: type = nib.Nifti1Image, **fields: Any) -> Path:
    """A file whose header holds `fields`, which nibabel would refuse to write or repair."""
    image = kind(VOXELS, AFFINE)
    image.set_qform(AFFINE, code=1)
    image.set_sform(AFFINE, code=1)
    data = bytearray(image.to_bytes())
    header = kind.header_class(bytes(data[: int(image.header["sizeof_hdr"])]), check=False)
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, number in value.items():
                header[name][index] = number
        else:
            header[name] = value
    data[: len(header.binaryblock)] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data)) if path.suffix == ".gz" else bytes(data))
    return path


def assert_refused(path: Path, code: str, text: str, error: type = InputError) -> None:
    with pytest.raises(error, match=text) as refusal:
        read_nifti(path)
    assert refusal.value.code == code


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "f4", "f8", "i4"])
def test_reading_gives_what_nibabel_reads(
    tmp_path: Path, suffix: str, kind: type, dtype: str
) -> None:
    path = tmp_path / f"a{suffix}"
    image = kind(VOXELS.astype(dtype), AFFINE)
    image.header.set_slope_inter(0.5, 3.0) if dtype == "i2" else None
    image.to_filename(path)
    volume = read_nifti(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, nib.load(path).get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)


def test_one_volume_of_a_4d_file_is_read(tmp_path: Path) -> None:
    nib.Nifti1Image(VOXELS[..., np.newaxis], AFFINE).to_filename(tmp_path / "a.nii")
    assert read_nifti(tmp_path / "a.nii").array.shape == (4, 5, 6)


def test_the_qform_is_used_when_the_sform_has_no_code(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    rigid = np.diag((-2.0, 2.0, 3.0, 1.0))
    image.set_qform(rigid, code=1)
    image.to_filename(tmp_path / "a.nii")
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").affine, rigid, atol=1e-6)


def test_the_sform_wins_over_a_qform_of_another_space(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, AFFINE)
    moved = np.diag((-2.0, 2.0, 3.0, 1.0))
    image.set_qform(moved, code=1)
    image.set_sform(AFFINE, code=4)
    image.to_filename(tmp_path / "a.nii")
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 4), (2, 2), (0, 3), (1, 0)])
def test_a_mask_repeats_the_place_of_its_image(
    tmp_path: Path, suffix: str, kind: type, codes: tuple[int, int]
) -> None:
    image = kind(VOXELS, AFFINE)
    image.set_qform(AFFINE, code=codes[0])
    image.set_sform(AFFINE, code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Doe, Jane"
    image.header["db_name" if kind is nib.Nifti1Image else "aux_file"] = b"Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe, Jane"))
    scan = tmp_path / f"scan{suffix}"
    image.to_filename(scan)
    opened = open_nifti(scan)
    volume = volume_of(opened)
    mask = Volume(volume.array > 60, volume.affine)
    write_nifti(mask, tmp_path / "mask.nii.gz", source=Source(opened.header, scan))
    before, after = nib.load(scan), nib.load(tmp_path / "mask.nii.gz")
    assert type(after) is kind
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(after.dataobj), mask.array)
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(after.get_qform(), before.get_qform())
    for field in ("qform_code", "sform_code", "xyzt_units"):
        assert after.header[field] == before.header[field]
    assert after.header["descrip"].item().decode() == NOTICE
    assert b"Doe" not in (tmp_path / "mask.nii.gz").read_bytes()
    assert b"Doe" not in gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())


def test_a_volume_without_source_is_written_with_both_forms(tmp_path: Path) -> None:
    volume = Volume(VOXELS, AFFINE)
    write_nifti(volume, tmp_path / "a.nii.gz", description="x" * 100)
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii.gz").array, volume.array)
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (2, 2)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["descrip"].item() == b"x" * 79


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(Volume(VOXELS, AFFINE), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_an_image_in_memory_keeps_its_exact_affine() -> None:
    affine = AFFINE + np.pad(np.full((3, 1), 1e-7), ((0, 1), (3, 0)))
    np.testing.assert_array_equal(volume_of(nib.Nifti1Image(VOXELS, affine)).affine, affine)


def test_the_scan_is_never_overwritten(tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii"
    nib.Nifti1Image(VOXELS, AFFINE).to_filename(scan)
    (tmp_path / "link.nii").symlink_to(scan)
    opened = open_nifti(scan)
    before = scan.read_bytes()
    for name in ("scan.nii", "link.nii"):
        with pytest.raises(InputError, match="is the input image itself") as refusal:
            write_nifti(volume_of(opened), tmp_path / name, source=Source(opened.header, scan))
        assert refusal.value.code == "argument.output"
    assert scan.read_bytes() == before


def test_another_grid_than_the_source_is_refused(tmp_path: Path) -> None:
    source = Source(nib.Nifti1Image(VOXELS, AFFINE).header)
    with pytest.raises(GeometryError, match="not on the grid of its source") as refusal:
        write_nifti(Volume(VOXELS, np.eye(4)), tmp_path / "a.nii", source=source)
    assert refusal.value.code == "geometry.foreign-source"
    assert list(tmp_path.iterdir()) == []


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.nii or \.nii\.gz") as refusal:
        write_nifti(Volume(VOXELS, AFFINE), tmp_path / "a.mgz")
    assert refusal.value.code == "argument.output"


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (20, 20, 20)).astype(np.int16)
    nib.Nifti1Image(noise, AFFINE).to_filename(tmp_path / "whole.nii.gz")
    whole = (tmp_path / "whole.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path / "cut.nii.gz", "volume.truncated", "cut off or damaged")
    (tmp_path / "cut.nii.gz").write_bytes(whole[:100])
    assert_refused(tmp_path / "cut.nii.gz", "volume.truncated", "cut off or damaged")
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:5000]))
    assert_refused(tmp_path / "cut.nii.gz", "volume.truncated", "holds 5000 bytes, 16352 are")
    nib.Nifti1Image(noise, AFFINE).to_filename(tmp_path / "whole.nii")
    (tmp_path / "cut.nii").write_bytes((tmp_path / "whole.nii").read_bytes()[:5000])
    assert_refused(tmp_path / "cut.nii", "volume.truncated", "16352 bytes; a file of 5000 bytes")


def test_a_single_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    nib.Nifti1Image(VOXELS, AFFINE).to_filename(tmp_path / "whole.nii")
    packed = bytearray(gzip.compress((tmp_path / "whole.nii").read_bytes(), compresslevel=0))
    packed[-100] ^= 1  # in the last voxels, which level 0 stores as they are
    (tmp_path / "flipped.nii.gz").write_bytes(packed)
    assert_refused(tmp_path / "flipped.nii.gz", "volume.format", "CRC check failed")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_cannot_make_us_take_memory(tmp_path: Path, suffix: str) -> None:
    path = damaged(
        tmp_path / f"huge{suffix}", nib.Nifti2Image, dim={1: 100_000, 2: 100_000, 3: 100_000}
    )
    tracemalloc.start()
    assert_refused(path, "volume.truncated", "announces 100000 x 100000 x 100000 voxels")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_more_voxels_than_a_scan_has_are_refused(tmp_path: Path) -> None:
    path = damaged(tmp_path / "sparse.nii", nib.Nifti2Image, dim={1: 2000, 2: 2000, 3: 2000})
    with path.open("r+b") as stream:
        stream.truncate(2 * 2000**3 + 544)  # a sparse file: no disk is used
    assert_refused(path, "volume.too-large", "2000 x 2000 x 2000 voxels, 7629 Mi")


@pytest.mark.parametrize(
    ("name", "data", "code", "text"),
    [
        ("text.nii.gz", b"a page of text", "volume.format", "no gzip file"),
        ("text.nii", b"a page of text " * 50, "volume.format", "does not begin with the header"),
        ("text.nii.gz", gzip.compress(b"text " * 200), "volume.format", "b'text tex'"),
        ("scan.nii", gzip.compress(b"x" * 999), "volume.format", "does not begin"),
        ("empty.nii", b"", "volume.format", "b''"),
        ("empty.nii.gz", b"", "volume.format", "b''"),
        ("scan.mgz", b"", "volume.format", r"ends in \.nii or \.nii\.gz"),
    ],
)
def test_other_formats_are_refused(
    tmp_path: Path, name: str, data: bytes, code: str, text: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert_refused(tmp_path / name, code, text)


def test_a_header_without_its_voxels_is_refused(tmp_path: Path) -> None:
    assert_refused(damaged(tmp_path / "pair.nii", magic=b"ni1"), "volume.format", "single-file")


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.nii", "volume.missing", "There is no file")
    (tmp_path / "folder.nii").mkdir()
    assert_refused(tmp_path / "folder.nii", "volume.unreadable", "Is a directory")


@pytest.mark.parametrize(
    ("shape", "code", "text"),
    [
        ((4, 5), "volume.not-3d", "2 axes"),
        ((4, 5, 6, 3), "volume.several", "3 volumes"),
        ((4, 5, 6, 1, 2), "volume.several", "2 volumes"),
    ],
)
def test_other_numbers_of_axes_are_refused(
    tmp_path: Path, shape: tuple[int, ...], code: str, text: str
) -> None:
    nib.Nifti1Image(np.zeros(shape, np.float32), AFFINE).to_filename(tmp_path / "a.nii")
    assert_refused(tmp_path / "a.nii", code, text)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.complex64, "complex64"),
        (np.complex128, "complex128"),
        ([("R", "u1"), ("G", "u1"), ("B", "u1")], "RGB"),
        ([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")], "RGBA"),
    ],
)
def test_numbers_that_are_no_intensities_are_refused(tmp_path: Path, dtype: Any, name: str) -> None:
    nib.Nifti1Image(np.zeros((4, 5, 6), dtype), AFFINE).to_filename(tmp_path / "a.nii")
    assert_refused(tmp_path / "a.nii", "volume.dtype", f"of type {name}")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"pixdim": {1: 0.0}}, "geometry.spacing", "0 x .* mm"),
        ({"pixdim": {2: -2.0}}, "geometry.spacing", "x -2 x"),
        ({"pixdim": {3: np.nan}}, "geometry.spacing", "x nan mm"),
        ({"srow_x": [0, 0, 0, 0]}, "geometry.singular-affine", "no volume"),
        ({"srow_y": [np.inf, 0, 0, 0]}, "geometry.affine", "finite"),
        ({"qform_code": 0, "sform_code": 0}, "geometry.no-orientation", "code 0"),
        ({"srow_x": [2.0, 0.0, 0.0, 90.0]}, "geometry.forms-disagree", "left and right"),
        ({"srow_x": [-2.0, 0.1, 0.0, 99.5]}, "geometry.forms-disagree", "9.0 mm apart"),
        ({"quatern_b": 5.0}, "geometry.qform", "no rotation"),
        ({"xyzt_units": 3}, "geometry.units", "micron"),
        ({"datatype": 1536}, "volume.dtype", "float128"),
        ({"datatype": 3}, "volume.dtype", "code 3"),
        ({"dim": {0: 9}}, "volume.format", "9 axes"),
        ({"dim": {1: -4}}, "volume.not-3d", "-4 x 5 x 6"),
        ({"vox_offset": 3.0}, "volume.format", "byte 3 on"),
        ({"vox_offset": np.nan}, "volume.truncated", "nan bytes"),
        ({"vox_offset": 1e30}, "volume.truncated", "can hold"),
        ({"scl_slope": 2.0, "scl_inter": np.nan}, "volume.format", "intercept"),
    ],
)
def test_damaged_headers_are_refused_and_nothing_is_repaired(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    suffix: str,
    fields: dict[str, Any],
    code: str,
    text: str,
) -> None:
    error = GeometryError if code.startswith("geometry") else InputError
    assert_refused(damaged(tmp_path / f"a{suffix}", **fields), code, text, error)
    assert capfd.readouterr().err == "", "nibabel's own warnings stay away"
