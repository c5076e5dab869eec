"""What the DICOM tests share: small series, and the independent programs that judge them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dicom_files import classic, save, turned
from mome_sdk.dicom.classify import choose, load_rules
from mome_sdk.dicom.series import checked_series, open_study
from mome_sdk.segmentation import Segmentation
from mome_sdk.study import Chosen
from mome_sdk.volume import Volume
from phantom import grid, phantom

# What every result says of its making; tests of the objects need no network.
PROVENANCE = {
    **{"mome_sdk": "0.1.0", "bundle": "test", "bundle_sha256": "ab" * 32, "engine": "bright"},
    **{"classes": ["background", "lesion"], "space": "mni", "precision": "fp32", "threads": 2},
}


def read(source: Any, wanted: str = "auto") -> Chosen:
    """The chosen series of a study."""
    with open_study(source) as study:
        choice = choose(study.stacks, wanted, load_rules())
        series = checked_series(choice.stack, modality=choice.modality, reasons=choice.reasons)
        return Chosen(series, study.volume(series), tuple(v.line for v in choice.verdicts))


def bright(volume: Volume, **more: Any) -> Segmentation:
    """What is brighter than any tissue of the phantom."""
    mask = (volume.array > 250).astype(np.uint8)
    return Segmentation(mask, volume.affine, provenance={**PROVENANCE, **more})


@pytest.fixture(scope="session")
def oblique(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Volume]:
    """A FLAIR series of 32 tilted slices with one lesion, and the volume it was made from."""
    volume = phantom(where=turned(grid(5.0).reorient("LPS"), 20.0, (1.0, 2.0, 0.5)))
    folder = tmp_path_factory.mktemp("oblique")
    save(classic(volume), folder)
    return folder, volume


@pytest.fixture(scope="session")
def chosen(oblique: tuple[Path, Volume]) -> Chosen:
    """The same, read."""
    return read(oblique[0])


@pytest.fixture(scope="session")
def dciodvfy(require_program: Callable[[str], Path]) -> Callable[[Path], list[str]]:
    """A function: the lines with Error that dciodvfy (dicom3tools) has for a file."""
    program = require_program("dciodvfy")

    def judge(path: Path) -> list[str]:
        done = subprocess.run([program, path], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert said.strip(), "dciodvfy names the kind of object at least"
        return [line for line in said.splitlines() if line.startswith("Error")]

    return judge


@pytest.fixture(scope="session")
def dcm2niix(require_program: Callable[[str], Path]) -> Callable[[Path, Path], nib.Nifti1Image]:
    """A function: what dcm2niix makes of the one series in a folder."""
    program = require_program("dcm2niix")

    def judge(folder: Path, out: Path) -> nib.Nifti1Image:
        out.mkdir(exist_ok=True)
        command = [program, "-b", "n", "-z", "n", "-o", out, folder]
        subprocess.run(command, capture_output=True, check=True)
        (path,) = out.glob("*.nii")
        return nib.load(path)

    return judge


@pytest.fixture(scope="session")
def dcmqi() -> Callable[[Path, Path], list[nib.Nifti1Image]]:
    """A function: the segments of a SEG as dcmqi's segimage2itkimage reads them, in order."""
    program = Path(sys.executable).with_name("segimage2itkimage")
    if not program.exists():
        pytest.skip('dcmqi is not installed: pip install "mome-sdk[test]".')

    def judge(seg: Path, out: Path) -> list[nib.Nifti1Image]:
        out.mkdir(exist_ok=True)
        command = [program, "--inputDICOM", seg, "--outputDirectory", out, "--outputType", "nii"]
        subprocess.run(command, capture_output=True, check=True)
        paths = sorted(out.glob("*.nii.gz"), key=lambda path: int(path.name.split(".")[0]))
        return [nib.load(path) for path in paths]

    return judge


def world_mean(image: nib.Nifti1Image, above: float) -> np.ndarray[Any, Any]:
    """Mean RAS position (mm) of the voxels over a value."""
    indices = np.argwhere(np.asanyarray(image.dataobj) > above)
    return nib.affines.apply_affine(image.affine, indices).mean(axis=0)
