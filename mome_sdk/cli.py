"""The command `mome`: one function per command, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import ENGINES
from mome_sdk.errors import EngineError, InputError, MomeError, PreparationError
from mome_sdk.files import check_writable, make_folder, write_file
from mome_sdk.nifti import NOTICE, read_nifti
from mome_sdk.options import BENCH, COMMON, TRAINING, parser
from mome_sdk.preprocess.align import Alignment
from mome_sdk.report import headline, lesion_table, picture, registration_picture, report
from mome_sdk.segmentation import Segmentation
from mome_sdk.segmenter import Segmenter

DONE, DEFECT, REFUSED, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended

_EXAMPLE = Path(__file__).parent / "data" / "example"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1, 2, 3 or 130 as in the README."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
    except MomeError as error:
        status = _refuse(error, debug=debug)
    except MemoryError as error:
        problem = MomeError(
            "engine.out-of-memory",
            f"There is not enough memory ({error}).",
            hint="Free some, or use a smaller --batch.",
        )
        status = _refuse(problem, debug=debug)
    except SystemExit as end:  # argparse after -h and --version
        status = end.code if isinstance(end.code, int) else REFUSED
    except KeyboardInterrupt:
        print("mome: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; without this Python complains once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(
            f"mome: defect: {type(error).__name__}: {_one_line(error)} This is a mistake of ours: "
            "please report it with the output of --debug.",
            file=sys.stderr,
        )
        status = DEFECT
    return status


def _dispatch(arguments: list[str]) -> int:
    words = [word for word in arguments if word not in COMMON]
    if words and words[0] in TRAINING:
        with _needs_extra("train"):
            from mome_sdk.training.__main__ import main as training_main
        return training_main(words)
    if words and words[0] in BENCH:
        with _needs_extra("bench"):
            from mome_sdk.benchmarks.__main__ import main as bench_main

            return bench_main(words[1:])
    options = parser().parse_args(arguments)
    if options.command is None:
        parser().print_help(sys.stderr)
        return REFUSED
    return _COMMANDS[options.command](options)


@contextlib.contextmanager
def _needs_extra(extra: str) -> Iterator[None]:
    """Name the line that installs what an import does not find."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EngineError(
            "engine.missing",
            f"This command needs the package {error.name}, which is not installed.",
            hint=f'Add it: pip install "mome-sdk[{extra}]".',
        ) from error


def _refuse(error: MomeError, *, debug: bool, about: str = "") -> int:
    """Say in one line what is wrong."""
    if debug:
        traceback.print_exc()
    text = f"{about}{error.message} {error.hint}".strip()
    print(f"mome: error [{error.code}]: {_one_line(text)}", file=sys.stderr)
    return REFUSED


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


@dataclass(frozen=True)
class _Job:
    """One input and the files to write for it."""

    image: Path
    mask: Path
    probability: Path | None = None
    picture: Path | None = None
    report: Path | None = None

    @property
    def outputs(self) -> dict[str, Path | None]:
        return {
            "output": self.mask,
            "probability": self.probability,
            "picture": self.picture,
            "report": self.report,
        }


def _predict(options: argparse.Namespace) -> int:
    jobs = _jobs(options)
    with Segmenter(
        options.model,
        options.engine,
        device=options.device,
        precision=options.precision,
        space=options.space,
        registration=options.registration,
        mirror=options.mirror,
        step=options.step,
        blend=options.blend,
        batch=options.batch,
        threads=options.threads,
    ) as segmenter:
        preparation = _preparation(segmenter, options)
        failed = [
            job
            for job in jobs
            if not _predict_one(segmenter, job, options, preparation, inputs=len(jobs))
        ]
    if not failed:
        return DONE
    return SOME_FAILED if len(failed) < len(jobs) else REFUSED


def _preparation(segmenter: Segmenter, options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Segmenter.predict`: the reference is registered once."""
    if options.reference is None:
        return {"brain_mask": options.brain_mask, "force": options.force}
    with _picture_of_refusal(segmenter, options.reference, _beside(options, options.reference)):
        reference = segmenter.align(
            options.reference, brain_mask=options.brain_mask, force=options.force
        )
    return {"reference": reference, "force": options.force}


def _beside(options: argparse.Namespace, image: Path) -> Path:
    """Where the picture of a refused reference goes: where the results go."""
    output: Path = options.output
    folder = output.parent if len(options.inputs) == 1 else output
    return folder / f"{_stem(image)}_refused.png"


@contextlib.contextmanager
def _picture_of_refusal(segmenter: Segmenter, image: Path, path: Path) -> Iterator[None]:
    """Draw what a check of the registration refuses, and name the picture in the error."""
    try:
        yield
    except PreparationError as error:
        if isinstance(error.attempt, Alignment):
            scan = read_nifti(image)
            png = registration_picture(scan, error.attempt.to_template, segmenter.bundle)
            write_file(path, png)
            error.hint = f"{error.hint} See {path}.".strip()
        raise


def _predict_one(
    segmenter: Segmenter,
    job: _Job,
    options: argparse.Namespace,
    preparation: Mapping[str, Any],
    *,
    inputs: int,
) -> bool:
    """Segment one input and write its files; False, and one line said, when it cannot be used."""
    files = {name: str(path) if path else None for name, path in job.outputs.items()}
    try:
        refused = job.mask.with_name(f"{_stem(job.mask)}_refused.png")
        with (
            _Progress(job.image.name) as progress,
            _picture_of_refusal(segmenter, job.image, refused),
        ):
            result = segmenter.predict(job.image, progress, shares=options.report, **preparation)
        _write(job, result, segmenter.bundle)
    except MomeError as error:
        about = f"{job.image.name}: " if inputs > 1 else ""
        _refuse(error, debug="debug" in options, about=about)
        if options.json:
            said = {"code": error.code, "message": error.message, "hint": error.hint}
            _print_json({"input": str(job.image), "error": said})
        return False
    if options.json:
        _print_json({"input": str(job.image), **files, **result.as_json()})
    else:
        _print_result(job, result, verbose="verbose" in options)
    return True


def _write(job: _Job, result: Segmentation, bundle: ModelBundle) -> None:
    result.save(job.mask)
    if job.probability is not None:
        result.save_probability(job.probability)
    if job.picture is not None and job.report is not None:
        scan = read_nifti(job.image)
        png = picture(scan, result)
        placed = None
        if result.provenance["preparation"] is not None:
            to_template = np.array(result.provenance["preparation"]["to_template"])
            placed = registration_picture(scan, to_template, bundle)
        page = report(result, png, title=job.image.name, registration=placed)
        write_file(job.picture, png)
        write_file(job.report, page.encode("utf-8"))


def _jobs(options: argparse.Namespace) -> list[_Job]:
    """What to read and write, checked as far as can be known before any work."""
    inputs: list[Path] = options.inputs
    if len(inputs) == 1:
        jobs = [_job(inputs[0], options.output, options)]
    else:
        folder: Path = options.output
        make_folder(folder)
        jobs = [_job(path, folder / f"{_stem(path)}.nii.gz", options) for path in inputs]
    seen: dict[Path, Path] = {}
    images = {path.resolve(): path for path in inputs}
    for job in jobs:
        for path in filter(None, job.outputs.values()):
            if path.resolve() in seen:
                raise InputError(
                    "argument.output",
                    f"{str(path)!r} would be written for {str(seen[path.resolve()])!r} and for "
                    f"{str(job.image)!r}.",
                    hint="Inputs with the same name need a folder each.",
                )
            if path.resolve() in images:
                raise InputError(
                    "argument.output",
                    f"The output {str(path)!r} is the input image itself.",
                    hint="Scans are never overwritten: name another file or folder.",
                )
            check_writable(path)
            seen[path.resolve()] = job.image
    return jobs


def _job(image: Path, mask: Path, options: argparse.Namespace) -> _Job:
    if not mask.name.endswith((".nii", ".nii.gz")):
        raise InputError(
            "argument.output",
            f"The output for one input is named {str(mask)!r}.",
            hint="A file whose name ends in .nii or .nii.gz is expected.",
        )
    base = mask.with_name(_stem(mask))
    return _Job(
        image,
        mask,
        probability=base.with_name(f"{base.name}_probability.nii.gz")
        if options.probability
        else None,
        picture=base.with_name(f"{base.name}.png") if options.report else None,
        report=base.with_name(f"{base.name}.html") if options.report else None,
    )


def _stem(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


class _Progress:
    """Windows done, on standard error: a bar on a terminal, elsewhere a line per quarter."""

    _WIDTH = 30

    def __init__(self, name: str) -> None:
        self._name = name
        self._quarter = -1

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            filled = self._WIDTH * done // total
            bar = "#" * filled + "-" * (self._WIDTH - filled)
            print(f"\r{self._name} [{bar}] {done}/{total}", end="", file=sys.stderr, flush=True)
        elif 4 * done // total > self._quarter:
            self._quarter = 4 * done // total
            print(f"{self._name}: {done} of {total} windows", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def _print_result(job: _Job, result: Segmentation, *, verbose: bool) -> None:
    written = ", ".join(str(path) for path in job.outputs.values() if path)
    made = result.provenance
    print(
        f"{job.image} -> {written}\n"
        f"{headline(result)} "
        f"{sum(result.timings.values()):.1f} s with {made['engine']}, {made['precision']}, "
        f"{made['windows']} windows, mirroring {made['mirror']}. {NOTICE}.",
        flush=True,
    )
    if result.lesions:
        print(lesion_table(result.lesions), flush=True)
    if verbose:
        for name, value in {**result.timings, **made}.items():
            print(
                f"  {name}: {value:.3f} s" if name in result.timings else f"  {name}: {value}",
                file=sys.stderr,
            )


def _demo(options: argparse.Namespace) -> int:
    folder: Path = options.output
    make_folder(folder)
    job = _Job(
        _EXAMPLE / "flair.nii.gz",
        folder / "lesions.nii.gz",
        picture=folder / "lesions.png",
        report=folder / "lesions.html",
    )
    for path in filter(None, job.outputs.values()):
        check_writable(path)
    with Segmenter("demo") as segmenter, _Progress("demo") as progress:
        result = segmenter.predict(job.image, progress, shares=True)
    _write(job, result, segmenter.bundle)
    known = read_nifti(_EXAMPLE / "lesion.nii.gz").array > 0
    print(f"Demonstration model and generated example. {NOTICE}.\n")
    print(lesion_table(result.lesions))
    print(f"\nlesions  {len(result.lesions):>8}\nvolume   {result.volume_ml:>8.2f} mL")
    print(f"Dice     {_dice(result.mask > 0, known):>8.3f}    against the example's known mask\n")
    for stage, seconds in result.timings.items():
        print(f"{stage:<9}{seconds:>8.2f} s")
    made = result.provenance
    print(
        f"\n{made['engine']}, {made['precision']}, {made['windows']} windows, mirroring "
        f"{made['mirror']}.\nWritten: "
        + ", ".join(str(path) for path in job.outputs.values() if path)
    )
    return DONE


def _dice(found: np.ndarray, known: np.ndarray) -> float:
    both = int(np.count_nonzero(found & known))
    either = int(np.count_nonzero(found)) + int(np.count_nonzero(known))
    return 2.0 * both / either if either else 1.0


def _import(options: argparse.Namespace) -> int:
    with _needs_extra("export"):
        from mome_sdk.export.checkpoint import import_checkpoint
    _print_bundle(import_checkpoint(options.folder, options.output, options.set))
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    _print_bundle(ModelBundle.load(options.path))
    return DONE


def _print_bundle(bundle: ModelBundle) -> None:
    architecture = bundle.architecture
    rows = {
        "name": bundle.name,
        "path": bundle.path,
        "sha256": bundle.sha256,
        "modalities": ", ".join(bundle.modalities),
        "classes": ", ".join(bundle.classes),
        "features": ", ".join(str(n) for n in architecture.features),
        "parameters": f"{sum(t.size for t in bundle.tensors.values()):,}",
        "patch": " x ".join(str(n) for n in bundle.patch) + " voxels",
        "spacing": " x ".join(f"{mm:g}" for mm in bundle.spacing_mm) + " mm",
        "axes": bundle.axes,
        "grid": " x ".join(str(n) for n in bundle.grid.shape) + " voxels",
        "blend": bundle.blend,
        "licence": bundle.licence,
        "notice": bundle.notice,
    }
    for name, value in rows.items():
        print(f"{name:<12}{_one_line(value)}")
    print(f"{'training':<12}{json.dumps(bundle.manifest.get('training'), indent=2)}")


def _doctor(_: argparse.Namespace) -> int:
    print(
        f"mome         {version('mome-sdk')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    features = ", ".join(name for name, present in _core.cpu_features().items() if present)
    print(f"processor    {features or 'no instruction set that the core looks for'}")
    print(f"threads      {_core.default_threads()} (MOME_THREADS changes it)")
    for number, name in enumerate(_gpus()):
        print(f"cuda:{number:<7} {name} (for the engine torch)")
    for name in ENGINES:
        print(f"{name:<12} {_engine_state(name)}")
    try:
        print(f"demo model   {ModelBundle.load('demo').sha256[:12]}, complete")
    except MomeError as error:
        print(f"demo model   {error}")
    return DONE


def _engine_state(name: str) -> str:
    """Version of the engine's library, or why it cannot run here."""
    if name == "native":
        try:
            return f"{_core.native_kernels()} kernels"
        except MomeError as error:
            return str(error)
    try:
        return version(name)
    except PackageNotFoundError:
        return f'missing: pip install "mome-sdk[{name}]"'


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs; none where their driver is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "predict": _predict,
    "import": _import,
    "inspect": _inspect,
    "doctor": _doctor,
}
