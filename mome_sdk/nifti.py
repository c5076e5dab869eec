"""read_nifti and write_nifti: NIfTI-1 and NIfTI-2 single files, whole or not at all."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from mome_sdk.errors import GeometryError, InputError
from mome_sdk.files import write_file
from mome_sdk.volume import Grid, Volume

NOTICE = "Research use only, not a medical device"

# 512 Mi voxels, 2 GiB as float32: a whole head at 0.25 mm. Beyond that a header is more likely
# damaged, or hostile, than a scan.
_MOST_VOXELS = 2**29
# Deflate cannot do better than 1,032 to 1 (zlib manual, "Maximum compression factor").
_MOST_COMPRESSION = 1032
# Length of the header, its first four bytes -> the magic of a single file, the reader.
_KINDS: dict[int, tuple[bytes, Callable[..., nib.Nifti1Header]]] = {
    348: (b"n+1", nib.Nifti1Header),
    540: (b"n+2", nib.Nifti2Header),
}
# Two forms with one of these codes (scanner, Talairach, MNI) claim the same space and must agree;
# "aligned" (2) may be aligned to two different things.
_ONE_SPACE_CODES = (1, 3, 4)
_MILLIMETRES = (0, 2)  # unknown, which every program takes for mm; and mm
# The header fields that say where the voxels are; a mask repeats them bit for bit.
_PLACE_FIELDS = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)


@dataclass(frozen=True, eq=False)
class Source:
    """What a mask must know of the NIfTI image it belongs to.

    Attributes:
        header: The image's header; a mask repeats its place of the voxels.
        path: The file, which a mask must not overwrite; None for an image in memory.
    """

    header: nib.Nifti1Header
    path: Path | None = None


def read_nifti(path: str | Path) -> Volume:
    """Read one 3D image from a .nii or .nii.gz file.

    Args:
        path: NIfTI-1 or NIfTI-2, single file. A fourth axis is accepted when its length is 1.

    Returns:
        Voxels (I, J, K) in the file's own axis order, float32, slope and intercept applied; the
        affine maps them to RAS mm. It is the sform when that has a code, else the qform (the rule
        of nibabel); forms that contradict each other are refused.

    Raises:
        InputError: `volume.*`: the file cannot be read, is not NIfTI, is cut off, announces more
            voxels than it can hold, or is no 3D image of real numbers. Sizes are checked in the
            header, before memory is taken.
        GeometryError: `geometry.*`: the header gives the voxels no place, or two.
    """
    return volume_of(open_nifti(path))


def open_nifti(path: str | Path) -> nib.Nifti1Image:
    """The image of a NIfTI file, its header checked and its voxels not yet scaled.

    Raises: as `read_nifti`.
    """
    path = Path(path)
    try:
        header = _raw_header(path)
        needed = _checked_size(path, header)
        voxels = io.BytesIO(_unpacked(path, needed)) if path.name.endswith(".gz") else path
        return _image(ArrayProxy(voxels, header, mmap=False), header)
    except FileNotFoundError as error:
        raise InputError(
            "volume.missing", f"There is no file {str(path)!r}.", hint="Check its name."
        ) from error
    except gzip.BadGzipFile as error:
        raise InputError(
            "volume.format",
            f"{path.name!r} is named .nii.gz, but is no gzip file or a damaged one: {error}.",
            hint="Convert or copy the scan again.",
        ) from error
    except (EOFError, zlib.error) as error:
        raise InputError(
            "volume.truncated",
            f"The gzip data of {path.name!r} are cut off or damaged: {error}.",
            hint="Copy or convert the scan again.",
        ) from error
    except OSError as error:
        raise InputError(
            "volume.unreadable",
            f"{str(path)!r} cannot be read: {error.strerror or error}.",
            hint="Name a file that you have the right to read.",
        ) from error
    except HeaderDataError as error:
        raise InputError(
            "volume.format",
            f"The header of {path.name!r} is no NIfTI header: {error}.",
            hint="Convert the scan again.",
        ) from error


def volume_of(image: nib.Nifti1Image) -> Volume:
    """The voxels and the affine of a nibabel NIfTI image, read and checked as in `read_nifti`.

    An image made in memory keeps its float64 affine, which its header rounds to float32.
    """
    grid = _checked_grid(image.header, image.shape)
    affine = grid.affine if image.affine is None else image.affine
    with np.errstate(over="ignore"):  # beyond float32: infinite, refused where it is used
        array = image.get_fdata(caching="unchanged", dtype=np.float32)
    return Volume(array.reshape(grid.shape), affine)


def write_nifti(
    volume: Volume, path: str | Path, *, source: Source | None = None, description: str = NOTICE
) -> None:
    """Write a volume to a .nii or .nii.gz file; a file of that name is replaced in one step.

    Args:
        volume: float32 or uint8 voxels (I, J, K).
        path: A name that ends in .nii or .nii.gz. The same volume gives the same bytes.
        source: The image whose grid the volume shares. Its qform, sform, codes and units are
            repeated exactly; nothing else of its header is, since headers can name the patient.
            Without it both forms hold the affine, rounded to float32, with code 2 ("aligned").
        description: Stands in the header's `descrip`, cut to 79 bytes.

    Raises:
        InputError: `argument.output`, `argument.output-folder`, the file cannot be written (no
            part of it is left), has another suffix, or is the source itself.
        GeometryError: `geometry.foreign-source`, the source is on another grid.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(
            "argument.output",
            f"The output is named {path.name!r}.",
            hint="The name of a NIfTI file ends in .nii or .nii.gz.",
        )
    if source is not None and source.path is not None and _same_file(source.path, path):
        raise InputError(
            "argument.output",
            f"The output {str(path)!r} is the input image itself.",
            hint="The scan is never overwritten: name another file.",
        )
    header = _header_for(volume, source)
    header["descrip"] = description.encode("utf-8")[:79]
    data: bytes = _image(volume.array, header).to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_file(path, data)


def _raw_header(path: Path) -> nib.Nifti1Header:
    """The header as it stands in the file: nibabel's own reader repairs some faults silently."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(
            "volume.format",
            f"The input is named {path.name!r}.",
            hint="A NIfTI file whose name ends in .nii or .nii.gz is expected.",
        )
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as stream:
        block = stream.read(540)
    for endianness, (size, (magic, kind)) in itertools.product("<>", _KINDS.items()):
        if len(block) >= size and block[:4] == struct.pack(f"{endianness}i", size):
            header: nib.Nifti1Header = kind(block[:size], endianness=endianness, check=False)
            if bytes(header["magic"].item())[:3] == magic:
                return header
    raise InputError(
        "volume.format",
        f"{path.name!r} does not begin with the header of a single-file NIfTI image but with "
        f"{block[:8]!r}.",
        hint="Convert the scan to NIfTI; a new name does not make another format of a file.",
    )


def _checked_size(path: Path, header: nib.Nifti1Header) -> int:
    """Bytes of header and voxels, before any are read.

    Refuses more than the file can hold, and more than any scan has.
    """
    rank, offset = int(header["dim"][0]), float(header["vox_offset"])
    if not 0 <= rank <= 7 or offset < header.single_vox_offset:
        raise InputError(
            "volume.format",
            f"By its header {path.name!r} has {rank} axes and voxels from byte {offset:g} on.",
            hint=f"At most 7 axes, and voxels behind the {header.single_vox_offset} bytes of the "
            "header, are expected: convert the scan again.",
        )
    grid = _checked_grid(header, tuple(int(n) for n in header["dim"][1 : rank + 1]))
    voxels = math.prod(grid.shape)
    needed = voxels * header.get_data_dtype().itemsize + offset
    size = path.stat().st_size
    room = size * _MOST_COMPRESSION if path.name.endswith(".gz") else size
    if not needed <= room:  # a vox_offset that is no number ends here too
        raise InputError(
            "volume.truncated",
            f"The header of {path.name!r} announces {_times(grid.shape)} voxels, {needed:.0f} "
            f"bytes; a file of {size} bytes can hold {room} at most.",
            hint="The file is cut off or its header damaged: copy or convert the scan again.",
        )
    if voxels > _MOST_VOXELS:
        raise InputError(
            "volume.too-large",
            f"The image has {_times(grid.shape)} voxels, {voxels / 2**20:.0f} Mi.",
            hint=f"At most {_MOST_VOXELS // 2**20} Mi are read: resample the scan to 1 mm.",
        )
    return int(needed)


def _unpacked(path: Path, needed: int) -> bytes:
    """The first `needed` bytes in a gzip file, which is read to its end for its checksum."""
    with gzip.open(path, "rb") as stream:
        data = stream.read(needed)
        while stream.read(2**20):
            pass
    if len(data) < needed:
        raise EOFError(f"it holds {len(data)} bytes, {needed} are announced")
    return data


def _checked_grid(header: nib.Nifti1Header, shape: tuple[int, ...]) -> Grid:
    """Where the voxels of a 3D image of real numbers are; refuses every other header."""
    if len(shape) < 3 or min(shape) < 1:
        raise InputError(
            "volume.not-3d",
            f"The image has {len(shape)} axes ({_times(shape)} voxels).",
            hint="One image with three axes of at least one voxel is expected.",
        )
    if math.prod(shape[3:]) != 1:
        raise InputError(
            "volume.several",
            f"The file holds {math.prod(shape[3:])} volumes ({_times(shape)} voxels).",
            hint="One is expected: split the file and name the volume you mean.",
        )
    try:
        real = header.get_data_dtype().kind in "iuf" and header.get_data_dtype().itemsize <= 8
        name = str(header.get_value_label("datatype"))
    except (HeaderDataError, KeyError):
        real, name = False, f"unknown, code {int(header['datatype'])}"
    if not real:
        raise InputError(
            "volume.dtype",
            f"The voxels are of type {name}.",
            hint="Real numbers are expected: integers or floating point of at most 64 bits.",
        )
    grid = Grid((shape[0], shape[1], shape[2]), _affine_of(header))
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0:
        _check_agreement(header, grid)
    return grid


def _affine_of(header: nib.Nifti1Header) -> NDArray[np.float64]:
    """Array index to RAS mm by the sform if it has a code, else by the qform."""
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(spacing).all() and spacing.min() > 0):
        raise GeometryError(
            "geometry.spacing",
            f"The voxels are {_times(spacing.tolist())} mm large by the header (pixdim).",
            hint="Three positive sizes are expected: the header is damaged, convert again.",
        )
    units = int(header["xyzt_units"]) & 7
    if units not in _MILLIMETRES:
        raise GeometryError(
            "geometry.units",
            f"The header gives positions in units of code {units} (1 is metre, 3 is micron).",
            hint="Millimetres are expected: convert the header.",
        )
    if int(header["sform_code"]) > 0:
        return np.asarray(header.get_sform(), np.float64)
    if int(header["qform_code"]) > 0:
        return _qform_of(header)
    raise GeometryError(
        "geometry.no-orientation",
        "The header does not say where the voxels are (sform and qform have code 0).",
        hint="Left and right would be a guess: convert from DICOM again, or set the sform yourself "
        "if you are sure of it.",
    )


def _qform_of(header: nib.Nifti1Header) -> NDArray[np.float64]:
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (ValueError, HeaderDataError) as error:
        raise GeometryError(
            "geometry.qform",
            f"The quaternion of the header is no rotation: {error}.",
            hint="The header is damaged: convert the scan again.",
        ) from error


def _check_agreement(header: nib.Nifti1Header, grid: Grid) -> None:
    """Refuse forms that mirror each other, or claim the same space and differ by over 1 mm.

    Forms of different codes may differ by a rotation and a shift (scanner and MNI, say); none of
    the spaces is mirrored, so opposite handedness means that one of them has left and right wrong.
    """
    qform = _qform_of(header)
    if np.linalg.det(grid.affine[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        raise GeometryError(
            "geometry.forms-disagree",
            "The sform of the header mirrors its qform: one has left and right exchanged.",
            hint="Correct the wrong one, or convert the scan again.",
        )
    code = int(header["sform_code"])
    if code == int(header["qform_code"]) and code in _ONE_SPACE_CODES:
        corners = list(itertools.product(*((0, length - 1) for length in grid.shape)))
        apart = grid.to_mm(corners) - Grid(grid.shape, qform).to_mm(corners)
        apart_mm = float(np.linalg.norm(apart, axis=1).max())
        if apart_mm > 1.0:
            raise GeometryError(
                "geometry.forms-disagree",
                f"The sform and the qform of the header both have code {code}, but place a corner "
                f"of the image {apart_mm:.1f} mm apart.",
                hint="Correct the wrong one, or convert the scan again.",
            )


def _header_for(volume: Volume, source: Source | None) -> nib.Nifti1Header:
    """A new header that holds nothing but type, shape and place."""
    like = source.header if source is not None else None
    header = nib.Nifti2Header() if isinstance(like, nib.Nifti2Header) else nib.Nifti1Header()
    header.set_data_dtype(volume.array.dtype)
    header.set_data_shape(volume.array.shape)
    header.set_xyzt_units("mm")
    if like is None:
        header.set_zooms(volume.grid.spacing_mm)
        header.set_qform(volume.affine, code="aligned", strip_shears=True)
        header.set_sform(volume.affine, code="aligned")
        return header
    # 1e-3 mm: a header holds the affine in float32.
    if not _checked_grid(like, volume.array.shape).matches(volume.grid, tolerance=1e-3):
        raise GeometryError(
            "geometry.foreign-source",
            "The volume to write is not on the grid of its source image.",
            hint="Write it without source, or resample it to the source's grid first.",
        )
    header["pixdim"][:4] = like["pixdim"][:4]
    for field in _PLACE_FIELDS:
        header[field] = like[field]
    return header


def _image(voxels: object, header: nib.Nifti1Header) -> nib.Nifti1Image:
    """Header and voxels as they are: without an affine nibabel leaves the header's place alone."""
    kind: Callable[..., nib.Nifti1Image] = nib.Nifti1Image
    if isinstance(header, nib.Nifti2Header):
        kind = nib.Nifti2Image
    return kind(voxels, None, header)


def _same_file(first: Path, second: Path) -> bool:
    return second.exists() and first.exists() and first.samefile(second)


def _times(sizes: Iterable[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)
