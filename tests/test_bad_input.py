"""The corpus of bad input: exit 2, one line that names what was found, and no partial file."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mome_sdk.bundle import ModelBundle
from mome_sdk.cli import main

AFFINE = np.diag((1.0, 1.0, 1.0, 1.0))
VOXELS = np.random.default_rng(0).normal(100.0, 20.0, (18, 20, 22)).astype(np.float32)


def nifti(voxels: np.ndarray = VOXELS, **fields: object) -> bytes:
    """An uncompressed file; `fields` overwrite its header, `kind` chooses NIfTI-2."""
    kind = fields.pop("kind", nib.Nifti1Image)
    data = bytearray(kind(voxels, AFFINE).to_bytes())  # type: ignore[operator]
    header_class = kind.header_class  # type: ignore[attr-defined]
    size = int.from_bytes(data[:4], "little")
    header = header_class(bytes(data[:size]), check=False)
    for name, (index, value) in fields.items():  # type: ignore[misc]
        header[name][index] = value
    data[:size] = header.binaryblock
    return bytes(data)


def with_value(value: float) -> np.ndarray:
    voxels = VOXELS.copy()
    voxels[3, 4, 5] = value
    return voxels


HUGE = {"kind": nib.Nifti2Image, "dim": (slice(1, 4), 100_000)}
CORPUS = {
    "truncated gz": ("a.nii.gz", gzip.compress(nifti())[:9000], "volume.truncated", "cut off"),
    "text renamed": ("a.nii.gz", b"Subject;Age\n1;50\n", "volume.format", "no gzip file"),
    "NaN": ("a.nii.gz", gzip.compress(nifti(with_value(np.nan))), "volume.not-finite", "1 of 7920"),
    "Inf": ("a.nii", nifti(with_value(np.inf)), "volume.not-finite", "1 of 7920 voxels"),
    "constant": ("a.nii", nifti(np.full_like(VOXELS, 7.0)), "volume.constant", "the value 7"),
    "2D": ("a.nii", nifti(VOXELS[:, :, 0]), "volume.not-3d", "2 axes (18 x 20 voxels)"),
    "one slice": ("a.nii", nifti(VOXELS[:, :, :1]), "volume.not-3d", "single slice"),
    "4D": ("a.nii", nifti(np.stack([VOXELS] * 3, -1)), "volume.several", "holds 3 volumes"),
    "zero spacing": ("a.nii", nifti(pixdim=(2, 0.0)), "geometry.spacing", "1 x 0 x 1 mm"),
    "negative spacing": ("a.nii", nifti(pixdim=(1, -1.0)), "geometry.spacing", "-1 x 1 x 1 mm"),
    "singular": (
        "a.nii",
        nifti(srow_y=(slice(None), 0.0)),
        "geometry.singular-affine",
        "no volume",
    ),
    "no place": ("a.nii", nifti(sform_code=((), 0)), "geometry.no-orientation", "code 0"),
    "huge, gz": ("a.nii.gz", gzip.compress(nifti(**HUGE)), "volume.truncated", "100000 x 100000"),
    "huge": ("a.nii", nifti(**HUGE), "volume.truncated", "100000 x 100000 x 100000 voxels"),
    "complex": ("a.nii", nifti(VOXELS.astype(complex)), "volume.dtype", "complex128"),
    "empty": ("a.nii.gz", b"", "volume.format", "does not begin"),
    "another format": ("a.mgz", b"", "volume.format", "ends in .nii or .nii.gz"),
}


@pytest.fixture
def arguments(tiny_bundle: ModelBundle) -> list[str]:
    return ["--model", str(tiny_bundle.path), "--space", "model", "--engine", "onnxruntime"]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    (tmp_path / "scan.nii").write_bytes(nifti())
    return tmp_path / "scan.nii"


def assert_refused(said: str, code: str, text: str) -> None:
    """One line, which names the code and what was found; progress may come before it."""
    lines = [line for line in said.splitlines() if not line.endswith("windows")]
    assert len(lines) == 1, said
    assert lines[0].startswith(f"mome: error [{code}]: ")
    assert text in lines[0]


@pytest.mark.parametrize("case", CORPUS)
def test_unusable_images_are_named(
    case: str, tmp_path: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    name, data, code, text = CORPUS[case]
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    options = ["-o", str(out / "mask.nii.gz"), "--report", "--probability", *arguments]
    assert main(["predict", str(tmp_path / name), *options]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert_refused(said.err, code, text)
    assert list(out.iterdir()) == []


def test_a_header_with_100000_voxels_per_axis_takes_no_memory(
    tmp_path: Path, arguments: list[str]
) -> None:
    """In a process that may not have 4 GiB; the voxels would take two million."""
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(nifti(**HUGE)))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
        "from mome_sdk.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "predict", str(tmp_path / "huge.nii.gz"), *arguments]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "m.nii")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert_refused(done.stderr, "volume.truncated", "100000 x 100000 x 100000 voxels")


def test_a_missing_image_and_a_folder_are_named(
    tmp_path: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["-o", str(tmp_path / "mask.nii.gz"), *arguments]
    assert main(["predict", str(tmp_path / "none.nii"), *options]) == 2
    assert_refused(capfd.readouterr().err, "volume.missing", "There is no file")
    (tmp_path / "folder.nii").mkdir()
    assert main(["predict", str(tmp_path / "folder.nii"), *options]) == 2
    assert_refused(capfd.readouterr().err, "argument.input", "names no image to segment")


def test_a_missing_output_folder_is_named(
    scan: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    out = scan.parent / "missing" / "mask.nii.gz"
    assert main(["predict", str(scan), "-o", str(out), *arguments]) == 2
    assert_refused(capfd.readouterr().err, "argument.output-folder", "does not exist")
    assert not out.parent.exists()


@pytest.fixture
def open_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are for their owner alone."""
    request.getfixturevalue("require_root")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_an_image_that_may_not_be_read_is_named(
    open_folder: Path, tiny_bundle: ModelBundle, capfd: pytest.CaptureFixture[str]
) -> None:
    scan, out, bundle = (open_folder / name for name in ("scan.nii", "mask.nii", "bundle"))
    scan.write_bytes(nifti())
    tiny_bundle.save(bundle)
    command = ["predict", str(scan), "-o", str(out), "--model", str(bundle), "--space", "model"]
    assert main(command) == 0  # whatever is imported on the way is there now
    out.unlink()
    scan.chmod(0o000)
    capfd.readouterr()
    os.seteuid(65534)
    try:
        assert main(command) == 2
    finally:
        os.seteuid(0)
    assert_refused(capfd.readouterr().err, "volume.unreadable", "Permission denied")
    assert {path.name for path in open_folder.iterdir()} == {"scan.nii", "bundle"}


@pytest.fixture
def tmpfs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 24 KiB: less than the mask and the report need."""
    request.getfixturevalue("require_root")
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_named(
    scan: Path, tmpfs: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    assert main(["predict", str(scan), "-o", str(tmpfs / "mask.nii"), *arguments]) == 2
    said = capfd.readouterr().err
    assert_refused(said, "argument.output", "Read-only file system")
    assert "windows" not in said, "found out before the work"


def test_a_full_disk_is_named_and_holds_no_part(
    scan: Path, tmpfs: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmpfs / "mask_probability.nii.gz").write_bytes(b"older")
    options = ["-o", str(tmpfs / "mask.nii.gz"), "--probability", *arguments]
    assert main(["predict", str(scan), *options]) == 2
    assert_refused(capfd.readouterr().err, "argument.output", "No space left on device")
    assert {path.name for path in tmpfs.iterdir()} <= {"mask.nii.gz", "mask_probability.nii.gz"}
    assert (tmpfs / "mask_probability.nii.gz").read_bytes() == b"older"
    if (tmpfs / "mask.nii.gz").exists():
        assert nib.load(tmpfs / "mask.nii.gz").get_fdata().shape == VOXELS.shape, "it is whole"
