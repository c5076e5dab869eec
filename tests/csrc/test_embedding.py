"""A C++ program without Python, built against the installed library, finds what Python finds."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import TINY, random_tensors
from mome_sdk.bundle import ModelBundle, create_bundle
from mome_sdk.segmenter import Segmenter

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (25, 21, 34)  # (I, J, K)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # it compiles the core


def cmake(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "cmake", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/example, built in a folder of its own from what was installed."""
    folder = tmp_path_factory.mktemp("embedding")
    parallel = ("--parallel", len(os.sched_getaffinity(0)))
    library = folder / "library"
    cmake("-S", ROOT / "csrc", "-B", library, "-DMOME_PYTHON=OFF", "-DMOME_CUDA=OFF")
    cmake("--build", library, *parallel)
    cmake("--install", library, "--prefix", folder / "prefix")
    shutil.rmtree(library)
    shutil.copytree(ROOT / "csrc/example", folder / "source")
    warnings = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    prefix = f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}"
    cmake("-S", folder / "source", "-B", folder / "build", prefix, warnings)
    cmake("--build", folder / "build")
    return folder / "build" / "segment"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .nii on the model's grid, with a name in it."""
    array = np.random.default_rng(4).gamma(2.0, 100.0, SHAPE).astype(np.float32)
    nifti = nib.Nifti1Image(array, np.array(nib.affines.from_matvec(np.eye(3), (-9, 7, 3.5))))
    nifti.header["descrip"] = b"Doe^Jane"
    path = tmp_path_factory.mktemp("images") / "scan.nii"
    nib.save(nifti, path)
    return path


@pytest.fixture(scope="module", params=["exact", "authors"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return create_bundle(
        tmp_path_factory.mktemp("bundles") / request.param,
        TINY,
        random_tensors(TINY),
        name="tiny",
        patch=(16, 8, 16),
        blend=request.param,
        training={"source": "random numbers", "odd": [1e-3, -2.5, None, True, {}, [], {"a": "b"}]},
    )


@pytest.fixture(scope="module")
def expected(bundle: ModelBundle, image: Path) -> NDArray[np.uint8]:
    mask = Segmenter(bundle, "native", space="model").predict(image).mask
    assert 0.1 < np.mean(mask) < 0.9  # of random weights, and no constant
    return mask


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def test_a_nifti_image_gets_the_mask_that_python_makes(
    program: Path, bundle: ModelBundle, image: Path, expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    out = tmp_path / "mask.nii"
    done = run(program, bundle.path, image, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Research use only, not a medical device" in done.stdout
    mask = nib.load(out)
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask.dataobj), expected)
    np.testing.assert_array_equal(mask.affine, nib.load(image).affine)
    assert mask.header["descrip"].item() == b"Research use only, not a medical device"
    assert b"Doe" not in out.read_bytes()


def test_raw_numbers_get_the_same_mask(
    program: Path, bundle: ModelBundle, image: Path, expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    raw, out = tmp_path / "scan.raw", tmp_path / "mask.raw"
    raw.write_bytes(image.read_bytes()[352:])
    done = run(program, bundle.path, raw, out, *SHAPE[::-1])
    assert (done.returncode, done.stderr) == (0, "")
    mask = np.frombuffer(out.read_bytes(), np.uint8).reshape(SHAPE[::-1])
    np.testing.assert_array_equal(mask.T, expected)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0, struct.pack("<i", 540), "a NIfTI-1 file"),
        (40, struct.pack("<h", 4), "three axes"),
        (42, struct.pack("<h", -1), "the shape is"),
        (44, struct.pack("<h", 30000), "a file of 34 x 30000 x 25 voxels"),
        (70, struct.pack("<h", 4), "float32 without scaling"),
        (112, struct.pack("<f", 2.0), "float32 without scaling"),
        (280, struct.pack("<f", -1.0), "the axes R, A, S and 1 mm"),
        (352, struct.pack("<f", np.nan), "[volume.not-finite]"),
    ],
)
def test_an_image_that_it_cannot_read_right_is_refused_in_one_line(
    program: Path,
    bundle: ModelBundle,
    image: Path,
    tmp_path: Path,
    offset: int,
    value: bytes,
    said: str,
) -> None:
    content = bytearray(image.read_bytes())
    content[offset : offset + len(value)] = value
    damaged = tmp_path / "damaged.nii"
    damaged.write_bytes(content)
    done = run(program, bundle.path, damaged, tmp_path / "mask.nii")
    assert done.returncode == 2
    assert said.lower() in done.stderr.lower()
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "mask.nii").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"SAR"', '"RAS"', "axes SAR and normalisation z-score are expected"),
        ('"format_version": 1', '"format_version": 2', "no mome-bundle of format version 1"),
        ('"blend": "', '"blend": "un', "the blend is neither exact nor authors"),
        ('"patch": [', '"patch": [16,', "patch, classes or modalities are missing"),
        ("-2.5", "-", "where this is expected: a value"),
        ("null", "nan", "where this is expected: a value"),
        ('"a": "b"', '"a": "b",', "where this is expected: '\"'"),
        ('"files"', "]", "where this is expected: '\"'"),
    ],
)
def test_a_bundle_that_it_cannot_use_is_refused_in_one_line(
    program: Path, bundle: ModelBundle, image: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    text = (folder / "bundle.json").read_text()
    assert old in text
    (folder / "bundle.json").write_text(text.replace(old, new))
    done = run(program, folder, image, tmp_path / "mask.nii")
    assert (done.returncode, done.stdout) == (2, "")
    assert "[bundle.manifest]" in done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bundle_or_an_image_that_is_not_there_is_refused(
    program: Path, bundle: ModelBundle, image: Path, tmp_path: Path
) -> None:
    for arguments, said in (
        ((tmp_path / "none", image, tmp_path / "mask.nii"), "[bundle.unreadable]"),
        ((bundle.path, tmp_path / "none.nii", tmp_path / "mask.nii"), "a NIfTI-1 file"),
        ((bundle.path, tmp_path / "none", tmp_path / "mask", 4, 4, 4), "No such file"),
        ((bundle.path, image, tmp_path / "none" / "mask.nii"), "could not be written"),
        ((bundle.path, image), "segment BUNDLE IMAGE MASK"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
