"""Affine registration of a scan to the bundle's template, by programs that others keep."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import nibabel as nib
import niimath
import numpy as np
from numpy.typing import NDArray

from mome_sdk.errors import EngineError, PreparationError
from mome_sdk.preprocess.intensity import head_of
from mome_sdk.volume import Volume, inverse

Matrix: TypeAlias = NDArray[np.float64]
Method: TypeAlias = Literal["niimath", "sitk", "ants"]
METHODS: tuple[Method, ...] = get_args(Method)

# What of a scan, from the top of the head down, is taken for the head: necks and shoulders would
# move its centre (FSL's robustfov looks at the same 170 mm).
_HEAD_MM = 170.0
# Turned by this much about the left-right axis, heads that lie far back or forward are caught too.
_NOD_DEGREES = (0.0, 25.0, -25.0)
# A scan takes 4 to 25 s; an image of noise kept it for over 5 minutes.
_TIMEOUT_S = 120
# ITK and ANTs count L, P, S where NIfTI counts R, A, S.
_LPS = np.diag((-1.0, -1.0, 1.0, 1.0))


class _ProgramError(Exception):
    """A program ended without a matrix; the text says how."""


def registrations(
    scan: Volume,
    template: Volume,
    centre_mm: NDArray[np.float64],
    *,
    method: Method = "niimath",
    threads: int | None = None,
) -> Iterator[Matrix]:
    """Affine registrations of a scan, one for each start; the caller judges and stops.

    Args:
        scan: The image (I, J, K), any axes; head or brain.
        template: The template brain.
        centre_mm: Middle of the template's brain, RAS mm: where the scan's head is put first.
        method: The program: "niimath"; "sitk" or "ants" with the extra of that name.
        threads: Most threads of the program; None leaves it to the program.

    Yields:
        4x4 matrices from the scan's RAS mm to the template's RAS mm, 12 degrees of freedom. The
        first start has the head's centre on the template's, the second is the header's own place,
        then the head is nodded forward and back.

    Raises:
        PreparationError: `registration.failed`, the program ended with an error every time.
        EngineError: `engine.missing`, the program is not installed.
    """
    program = _PROGRAMS[method]
    starts = [_centred(scan, centre_mm, degrees) for degrees in _NOD_DEGREES]
    starts.insert(1, np.eye(4))
    problem = ""
    found = False
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        files = _Files(Path(folder, "scan.nii"), Path(folder, "template.nii"))
        nib.save(nib.Nifti1Image(template.array, template.affine), files.template)
        for start in starts:
            moving = np.asarray(scan.array, np.float32)
            nib.save(nib.Nifti1Image(moving, start @ scan.affine), files.scan)
            try:
                template_to_scan = program.run(files, threads)
            except _ProgramError as error:
                problem = str(error)
                continue
            found = True
            yield inverse(template_to_scan) @ start
    if not found:
        raise PreparationError(
            "registration.failed",
            f"The registration program {name_of(method)} ended with an error: {problem}",
            hint="Reinstall it, or register the image yourself and use space 'mni'.",
        )


def name_of(method: Method) -> str:
    """Name and version of the program, for the provenance."""
    package = _PROGRAMS[method].package
    return f"{package} {version(package)}"


def check_installed(method: Method) -> None:
    """Refuse a program that is not there.

    Raises:
        EngineError: `engine.missing`.
    """
    try:
        importlib.import_module(_PROGRAMS[method].module)
    except ModuleNotFoundError as error:
        raise EngineError(
            "engine.missing",
            f"Registration by {method} needs the package {error.name}, which is not installed.",
            hint=f'Add it: pip install "mome-sdk[{method}]".',
        ) from error


class _Files(NamedTuple):
    scan: Path
    template: Path


class _Program(NamedTuple):
    """`run` gives the matrix from the template's RAS mm to the scan's, or raises _ProgramError."""

    package: str
    module: str
    run: Callable[[_Files, int | None], Matrix]


def _niimath(files: _Files, threads: int | None) -> Matrix:
    matrix = files.scan.with_name("matrix.json")
    matrix.unlink(missing_ok=True)
    moved = str(files.scan.with_name("moved.nii"))
    command = [niimath.bin, str(files.scan), "-allineate", str(files.template)]
    command += ["-linear", "-savemat", str(matrix), moved]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _ProgramError(f"{type(error).__name__}.") from error
    if done.returncode != 0 or not matrix.exists():
        raise _ProgramError(f"exit status {done.returncode}, no matrix written.")
    return _checked(np.array(json.loads(matrix.read_text())["fixed_to_moving"], np.float64))


def _sitk(files: _Files, threads: int | None) -> Matrix:
    """Mattes mutual information, rigid and then affine, on a tenth of the voxels."""
    import SimpleITK as sitk  # noqa: N813 (its own documentation calls it so)

    try:
        fixed = sitk.ReadImage(str(files.template), sitk.sitkFloat32)
        moving = sitk.ReadImage(str(files.scan), sitk.sitkFloat32)
        centre = fixed.TransformContinuousIndexToPhysicalPoint([n / 2 for n in fixed.GetSize()])
        rigid = sitk.Euler3DTransform()
        rigid.SetCenter(centre)
        _optimised(sitk, fixed, moving, rigid, threads)
        affine = sitk.AffineTransform(3)
        affine.SetCenter(centre)
        affine.SetMatrix(rigid.GetMatrix())
        affine.SetTranslation(rigid.GetTranslation())
        _optimised(sitk, fixed, moving, affine, threads)
    except RuntimeError as error:
        raise _ProgramError(str(error).strip().splitlines()[-1]) from error
    linear = np.array(affine.GetMatrix()).reshape(3, 3)
    return _from_lps(linear, np.array(affine.GetTranslation()), np.array(centre))


def _optimised(sitk: Any, fixed: Any, moving: Any, transform: Any, threads: int | None) -> None:
    """Improve a transform (template to scan, LPS mm) in place: shrink 8, 4, 2."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-4, numberOfIterations=200
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([8, 4, 2])
    method.SetSmoothingSigmasPerLevel([3, 2, 1])
    method.SetInitialTransform(transform, inPlace=True)
    if threads is not None:
        method.SetNumberOfThreads(threads)
    method.Execute(fixed, moving)


def _ants(files: _Files, threads: int | None) -> Matrix:
    """The published preparation's parameters (MoME, AffineRegPrepro.py): rigid, then affine."""
    import ants
    from ants.internal import get_lib_fn

    fixed, moving = str(files.template), str(files.scan)
    prefix = str(files.scan.with_name("ants"))
    arguments = ["-d", "3", "--float", "1", "-o", prefix, "-w", "[0.005,0.995]", "-u", "0"]
    arguments += ["-r", f"[{fixed},{moving},1]"]
    for transform in ("Rigid[0.1]", "Affine[0.1]"):
        arguments += ["-t", transform, "-m", f"MI[{fixed},{moving},1,32,Regular,0.25]"]
        arguments += ["-c", "[1000x500x250x0,1e-6,10]", "-f", "8x4x2x1", "-s", "3x2x1x0"]
    before = os.environ.get("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    if threads is not None:
        os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    try:
        status = get_lib_fn("antsRegistration")(arguments)
    finally:
        if before is None:
            os.environ.pop("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", None)
        else:
            os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = before
    if status != 0:
        raise _ProgramError(f"exit status {status}.")
    found = ants.read_transform(f"{prefix}0GenericAffine.mat")
    linear = np.array(found.parameters[:9]).reshape(3, 3)
    return _from_lps(linear, np.array(found.parameters[9:]), np.array(found.fixed_parameters))


_PROGRAMS: dict[Method, _Program] = {
    "niimath": _Program("niimath", "niimath", _niimath),
    "sitk": _Program("SimpleITK", "SimpleITK", _sitk),
    "ants": _Program("antspyx", "ants", _ants),
}


def _from_lps(
    linear: Matrix, translation: NDArray[np.float64], centre: NDArray[np.float64]
) -> Matrix:
    """ITK's x -> linear (x - centre) + translation + centre, in L, P, S, as a matrix in R, A, S."""
    lps = np.eye(4)
    lps[:3, :3] = linear
    lps[:3, 3] = translation + centre - linear @ centre
    return _checked(_LPS @ lps @ _LPS)


def _checked(matrix: Matrix) -> Matrix:
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise _ProgramError(f"its matrix is {matrix.tolist()}.")
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-3:
        raise _ProgramError("its matrix leaves no volume.")
    return matrix


def _centred(scan: Volume, centre_mm: NDArray[np.float64], degrees: float) -> Matrix:
    """The scan's mm to mm in which its head's centre is at `centre_mm`, nodded by `degrees`."""
    places_mm = scan.grid.to_mm(np.argwhere(head_of(scan).array)[::7])
    top = np.percentile(places_mm[:, 2], 99.9)
    head = places_mm[places_mm[:, 2] > top - _HEAD_MM]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    start = np.eye(4)
    start[1:3, 1:3] = (cosine, -sine), (sine, cosine)
    start[:3, 3] = centre_mm - start[:3, :3] @ head.mean(axis=0)
    return start
