"""The command `mome`: one function per command, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mome_sdk import describe
from mome_sdk.batch import run
from mome_sdk.bundle import EXAMPLE, ModelBundle
from mome_sdk.cases import (
    Case,
    collected_cases,
    draw_refusal,
    is_collection,
    is_study,
    named_cases,
)
from mome_sdk.errors import EngineError, InputError, MomeError, PreparationError, out_of_memory
from mome_sdk.exported import parity_line
from mome_sdk.files import check_writable, make_folder
from mome_sdk.nifti import NOTICE, read_nifti
from mome_sdk.options import BENCH, COMMON, TRAINING, parser
from mome_sdk.report import headline, lesion_table
from mome_sdk.segmentation import Segmentation
from mome_sdk.segmenter import Segmenter

DONE, DEFECT, REFUSED, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended

# The options of `mome predict` that are arguments of the Segmenter.
_SETTINGS = (
    *("model", "engine", "device", "precision", "space", "registration", "mirror"),
    *("step", "blend", "batch", "threads"),
)
# Those that only a DICOM study has.
_OF_A_STUDY = ("series", "format", "segments", "empty_seg", "series_rules")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1, 2, 3 or 130 as in the README."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name of a file is bytes that need not be text: say it as JSON and Python would.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
    except MomeError as error:
        status = _refuse(error, debug=debug)
    except MemoryError as error:
        status = _refuse(out_of_memory(error), debug=debug)
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
    _print_error(error.code, f"{about}{error.message} {error.hint}")
    return REFUSED


def _print_error(code: str, text: str) -> None:
    print(f"mome: error [{code}]: {_one_line(text)}", file=sys.stderr)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _predict(options: argparse.Namespace) -> int:
    settings = {name: getattr(options, name) for name in _SETTINGS}
    wanted = {"probability": options.probability, "report": options.report}
    if _names_study(options):
        return _predict_study(settings, options)
    collections = [path for path in options.inputs if is_collection(path)]
    if not collections:
        if options.ray is not None:
            raise InputError(
                "argument.ray",
                "Actors were asked for, but no folder or list of images.",
                hint="Leave out --ray, or name a folder or a list.",
            )
        return _predict_named(
            named_cases(options.inputs, options.output, **wanted), settings, options
        )
    if len(options.inputs) > 1:
        raise InputError(
            "argument.input",
            f"{str(collections[0])!r} stands beside other inputs.",
            hint="Name one folder or one list, or images only.",
        )
    return _predict_collected(
        collected_cases(collections[0], options.output, **wanted), settings, options
    )


def _names_study(options: argparse.Namespace) -> bool:
    """Whether the input is DICOM; refuses what does not go together."""
    asked = [name for name in _OF_A_STUDY if getattr(options, name)]
    studies = [path for path in options.inputs if is_study(path)]
    if not studies and not asked:
        return False
    if not studies:
        raise InputError(
            f"argument.{asked[0].replace('_', '-')}",
            f"--{asked[0].replace('_', '-')} is given, but no DICOM study.",
            hint="It is for a folder with DICOM files, and without NIfTI files, or a .zip.",
        )
    if len(options.inputs) > 1 or options.ray is not None:
        raise InputError(
            "argument.input",
            f"{str(studies[0])!r} is a DICOM study, beside other inputs or --ray.",
            hint="Name one study.",
        )
    return True


def _predict_study(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Segment one series of a DICOM study."""
    from mome_sdk.dicom.classify import load_rules
    from mome_sdk.study import read_study, study_case

    (source,) = options.inputs
    rules = load_rules(options.series_rules)
    case = study_case(
        source,
        options.output,
        formats=options.format or ("nifti",),
        segments=options.segments or "lesion",
        empty_seg=options.empty_seg,
        probability=options.probability,
        report=options.report,
    )
    started = time.perf_counter()
    chosen = read_study(source, options.series or "auto", rules=rules)
    read_s = time.perf_counter() - started
    with Segmenter(**settings) as segmenter:
        preparation = _preparation(segmenter, case.mask.parent, options)
        try:
            with _Progress(chosen.series.label) as progress:
                result = segmenter.predict(
                    chosen.volume, progress, shares=options.report, **preparation
                )
        except PreparationError as error:
            draw_refusal(error, chosen.volume, case.refused, segmenter.bundle)
            raise
        result = replace(result, timings={**result.timings, "read": read_s})
        case = case.save_study(chosen, result, segmenter.bundle)
    if options.json:
        _print_json({**case.record(result), "series": chosen.as_json()})
        return DONE
    for line in chosen.considered if "verbose" in options else ():
        print(f"  {line}", file=sys.stderr)
    print(f"{chosen.series.label}: {chosen.series.modality}, {'; '.join(chosen.series.reasons)}.")
    _print_result(case, result, verbose="verbose" in options)
    return DONE


def _predict_named(
    cases: Sequence[Case], settings: dict[str, Any], options: argparse.Namespace
) -> int:
    with Segmenter(**settings) as segmenter:
        preparation = _preparation(segmenter, cases[0].mask.parent, options)
        done = sum(
            _predict_one(segmenter, case, options, preparation, inputs=len(cases)) for case in cases
        )
    return _status(done, len(cases))


def _preparation(segmenter: Segmenter, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Segmenter.predict`: the reference is registered once."""
    if options.reference is None:
        return {"brain_mask": options.brain_mask, "force": options.force}
    reference: Path = options.reference
    try:
        alignment = segmenter.align(reference, brain_mask=options.brain_mask, force=options.force)
    except PreparationError as error:
        draw_refusal(error, reference, folder / f"{reference.name}_refused.png", segmenter.bundle)
        raise
    return {"reference": alignment, "force": options.force}


def _predict_one(
    segmenter: Segmenter,
    case: Case,
    options: argparse.Namespace,
    preparation: Mapping[str, Any],
    *,
    inputs: int,
) -> bool:
    """Segment one input and write its files; False, and one line said, when it cannot be used."""
    try:
        with _Progress(case.image.name) as progress:
            result = segmenter.predict(case.image, progress, shares=options.report, **preparation)
        case.save(result, segmenter.bundle)
    except MomeError as error:
        draw_refusal(error, case.image, case.refused, segmenter.bundle)
        about = f"{case.image.name}: " if inputs > 1 else ""
        _refuse(error, debug="debug" in options, about=about)
        if options.json:
            _print_json(case.refusal(error))
        return False
    if options.json:
        _print_json(case.record(result))
    else:
        _print_result(case, result, verbose="verbose" in options)
    return True


def _predict_collected(
    cases: Sequence[Case], settings: dict[str, Any], options: argparse.Namespace
) -> int:
    """Segment a folder or a list: a line for each case of this run, at the end how many there are.

    Ray writes messages of its own on standard output: they go where errors go.
    """
    out = sys.stdout
    for name in ("reference", "brain_mask"):
        if getattr(options, name) is not None:
            raise InputError(
                "argument.input",
                f"--{name.replace('_', '-')} is given with a folder or a list.",
                hint="It is of one session: name the images of that session one by one.",
            )
    outcomes = run(cases, options.output, settings, force=options.force, ray=options.ray)
    done = earlier = 0
    with contextlib.redirect_stdout(sys.stderr), contextlib.closing(outcomes):
        for number, outcome in enumerate(outcomes, start=1):
            row = outcome.row
            done += row["status"] == "done"
            earlier += outcome.record is None
            if outcome.record is None:
                continue
            if options.json:
                _print_json(outcome.record, out)
            elif row["status"] == "done":
                print(
                    f"{number}/{len(cases)} {outcome.case.name}: {row['lesions']} lesions, "
                    f"{row['volume_ml']:.2f} mL. {sum(row['seconds'].values()):.1f} s",
                    file=out,
                    flush=True,
                )
            if row["status"] == "failed":
                _print_error(row["code"], f"{outcome.case.name}: {row['message']}")
    print(
        f"{done} of {len(cases)} images are done, {len(cases) - done} were refused; {earlier} of "
        f"them by an earlier run. {options.output / 'results.csv'} has a row for each. {NOTICE}.",
        file=sys.stderr if options.json else out,
    )
    return _status(done, len(cases))


def _status(done: int, inputs: int) -> int:
    if done == inputs:
        return DONE
    return SOME_FAILED if done else REFUSED


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


def _print_json(value: dict[str, Any], out: TextIO | None = None) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=out, flush=True)


def _print_result(case: Case, result: Segmentation, *, verbose: bool) -> None:
    written = ", ".join(str(path) for path in case.files)
    made = result.provenance
    print(
        f"{case.image} -> {written}\n"
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
    case = Case(
        "demo",
        EXAMPLE / "flair.nii.gz",
        folder / "lesions.nii.gz",
        picture=folder / "lesions.png",
        report=folder / "lesions.html",
    )
    for path in case.files:
        check_writable(path)
    with Segmenter("demo") as segmenter, _Progress("demo") as progress:
        result = segmenter.predict(case.image, progress, shares=True)
    case.save(result, segmenter.bundle)
    known = read_nifti(EXAMPLE / "lesion.nii.gz").array > 0
    print(f"Demonstration model and generated example. {NOTICE}.\n")
    print(lesion_table(result.lesions))
    print(f"\nlesions  {len(result.lesions):>8}\nvolume   {result.volume_ml:>8.2f} mL")
    print(f"Dice     {_dice(result.mask > 0, known):>8.3f}    against the example's known mask\n")
    for stage, seconds in result.timings.items():
        print(f"{stage:<9}{seconds:>8.2f} s")
    made = result.provenance
    print(
        f"\n{made['engine']}, {made['precision']}, {made['windows']} windows, mirroring "
        f"{made['mirror']}.\nWritten: " + ", ".join(str(path) for path in case.files)
    )
    return DONE


def _dice(found: np.ndarray, known: np.ndarray) -> float:
    both = int(np.count_nonzero(found & known))
    either = int(np.count_nonzero(found)) + int(np.count_nonzero(known))
    return 2.0 * both / either if either else 1.0


def _import(options: argparse.Namespace) -> int:
    with _needs_extra("export"):
        from mome_sdk.export.checkpoint import import_checkpoint
    describe.bundle(import_checkpoint(options.folder, options.output, options.set))
    return DONE


def _serve(options: argparse.Namespace) -> int:
    with _needs_extra("serve"):
        from mome_sdk.pacs.service import Service
        from mome_sdk.pacs.settings import load_service_config
    config = load_service_config(options.config)
    try:
        Service(config).run()
    except OSError as error:
        raise EngineError(
            "engine.address",
            f"The node cannot listen: {error.strerror or error}.",
            hint="Another program has the port, or the address is not this machine's.",
        ) from error
    return DONE


def _export(options: argparse.Namespace) -> int:
    with _needs_extra("export"):
        from mome_sdk.export.job import Aim
        from mome_sdk.export.targets import TARGETS, check_export, export_bundle
    making = (options.bundle, options.target, options.output)
    if options.check is not None and making != (None, None, None):
        raise InputError(
            "argument.usage",
            "--check stands beside what makes an export.",
            hint="Give --check and a folder alone.",
        )
    if options.check is not None:
        print(parity_line(check_export(options.check)))
        return DONE
    if None in making:
        raise InputError(
            "argument.usage",
            "BUNDLE, --target and -o are needed to make an export.",
            hint="See `mome export -h`.",
        )
    with _needs_extra("export"):
        made = export_bundle(
            ModelBundle.load(options.bundle),
            options.output,
            options.target,
            precision=options.precision,
            experts=options.experts,
            batch=options.batch,
            aim=None
            if options.sm is None and options.timing_cache is None
            else Aim(tuple(options.sm or ()), timing_cache=options.timing_cache),
            progress=lambda stage: print(f"{options.target}: {stage}", file=sys.stderr, flush=True),
        )
    if caution := TARGETS[made.target].caution:
        print(f"mome: caution: {caution}", file=sys.stderr)
    print(f"{options.output}: {made.target}, {made.precision}, {made.experts} experts")
    print(f"parity: {parity_line(made.manifest['parity'])}")
    if made.manifest["fp32_tensors"]:
        print(f"kept in fp32: {', '.join(made.manifest['fp32_tensors'])}")
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    describe.any_model(options.path)
    return DONE


def _doctor(_: argparse.Namespace) -> int:
    describe.machine()
    return DONE


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "predict": _predict,
    "import": _import,
    "export": _export,
    "serve": _serve,
    "inspect": _inspect,
    "doctor": _doctor,
}
