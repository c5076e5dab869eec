"""`mome bench SUITE`: options, the machine's record around a suite, and what is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from mome_sdk._core import default_threads
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import RUNS
from mome_sdk.errors import InputError
from mome_sdk.files import make_folder
from mome_sdk.segmenter import MIRRORS

from .measure import Table, say
from .worker import COMPILED, PUBLISHED

# Suite -> what it measures, and rounds by default: with the demonstration model, at full size.
SUITES = {
    "engines": ("one window of every engine, and its peak memory", (10, 5)),
    "kernels": ("the native engine's kernels beside PyTorch, and the runner", (5, 5)),
    "window": ("our sliding window, nnU-Net's and MONAI's around one network", (5, 1)),
    "end-to-end": ("an image from .nii.gz to .nii.gz, by stage", (5, 1)),
    "cold-start": ("process start to the first window, by stage", (10, 5)),
    "preprocess": ("reading, registration and the way back, by stage", (3, 3)),
    "training": ("memory of a training step at the published size, plain and recomputed", (1, 1)),
    "dicom": (
        "series through the DICOM node, beside Orthanc; as root; a round is a series",
        (100, 1),
    ),
    "gpu": ("the published predictor, PyTorch, MONAI and TensorRT on a CUDA device", (10, 5)),
}
# Suite -> what its --engines may name.
CONTENDERS = {
    "engines": (*RUNS["bundle"], COMPILED),
    "end-to-end": (*RUNS["bundle"], COMPILED, PUBLISHED),
    "cold-start": RUNS["bundle"],
}


def main(argv: Sequence[str]) -> int:
    """Run a suite; print its table, and write DIR/SUITE.json, .md and .svg."""
    options = command_line().parse_args(argv)
    from . import machine, report  # not before a wrong command line was refused

    if options.suite == "gpu":
        from . import gpu

        gpu.require_cuda()
    make_folder(options.output)
    measure = _suite(options)
    state = _state(options, machine.state)
    before = state()
    table = measure()
    found = report.result(
        table,
        command=["mome", "bench", *argv],
        machine=machine.record(),
        states=[before, state()],
    )
    written = report.write(found, options.output)
    print(report.markdown(found))
    say("written: " + ", ".join(map(str, written)))
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError("argument.usage", f"{message}.", hint=f"See `{self.prog} -h`.")


def command_line() -> argparse.ArgumentParser:
    """The parser of all suites."""
    parser = _Parser(
        prog="mome bench",
        description="Measure side by side, interleaved in one run; every row has its parity "
        "figure. Close other programs first.",
    )
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True, title="suites")
    for name, (summary, _) in SUITES.items():
        suite = suites.add_parser(name, help=summary, description=f"Measures {summary}.")
        _add_options(suite, name)
    return parser


def _add_options(suite: argparse.ArgumentParser, name: str) -> None:
    suite.add_argument(
        "-o", "--output", type=Path, default=Path("bench-out"), metavar="DIR",
        help="folder for SUITE.json, .md, .svg and the full-size bundle (default: bench-out)",
    )  # fmt: skip
    if name != "gpu":
        suite.add_argument(
            "--threads", type=int, default=default_threads(), metavar="N",
            help="threads of every contender (default: MOME_THREADS, or all cores)",
        )  # fmt: skip
    if name == "training":
        return
    suite.add_argument("--rounds", type=_rounds, metavar="N", help="measurements of every row")
    if name in ("kernels", "dicom"):
        return
    if name == "preprocess":
        suite.add_argument(
            "scans", type=Path, nargs="*", metavar="SCAN",
            help="NIfTI files in their native space (default: the bundled example)",
        )  # fmt: skip
    model = suite.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="BUNDLE", help="bundle folder or .zip (default: demo)")
    if name != "preprocess":
        model.add_argument(
            "--full-size", action="store_true",
            help="the published size with random weights; the bundle, 0.75 GB, stays in DIR",
        )  # fmt: skip
    if name in CONTENDERS:
        suite.add_argument(
            "--engines", metavar="A,B", help=f"only these of {', '.join(CONTENDERS[name])}"
        )
    if name in ("window", "end-to-end"):
        suite.add_argument("--mirror", choices=tuple(MIRRORS), default="none")


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError("1 or more are needed")
    return rounds


def _suite(options: argparse.Namespace) -> Callable[[], Table]:
    """The suite with its options, ready to measure."""
    if options.suite == "kernels":
        from . import kernels

        return partial(
            kernels.run,
            threads=options.threads,
            rounds=options.rounds or SUITES["kernels"][1][0],
        )
    if options.suite == "training":
        from . import training

        return partial(training.run, threads=options.threads)
    if options.suite == "dicom":
        from . import dicom

        return partial(
            dicom.run,
            series=options.rounds or SUITES["dicom"][1][0],
            threads=options.threads,
        )
    only = _only(options) if options.suite in CONTENDERS else None
    bundle = _bundle(options)
    rounds = options.rounds or SUITES[options.suite][1][_is_full_size(options)]
    if options.suite == "gpu":
        from . import gpu

        exports = gpu.plans(bundle, options.output / "plans")
        return partial(gpu.run, bundle, rounds=rounds, exports=exports)
    common: dict[str, Any] = {"rounds": rounds, "threads": options.threads}
    if options.suite == "window":
        from . import window

        return partial(window.run, bundle, mirror=options.mirror, **common)
    if options.suite == "end-to-end":
        from . import end_to_end

        return partial(end_to_end.run, bundle, mirror=options.mirror, only=only, **common)
    if options.suite == "cold-start":
        from . import cold_start

        return partial(cold_start.run, bundle, only=only, **common)
    if options.suite == "preprocess":
        from . import preprocess

        return partial(preprocess.run, bundle, options.scans, **common)
    from . import engines

    return partial(engines.run, bundle, only=only, **common)


def _is_full_size(options: argparse.Namespace) -> bool:
    return getattr(options, "full_size", False)


def _bundle(options: argparse.Namespace) -> ModelBundle:
    if _is_full_size(options):
        from .models import full_size_bundle

        return full_size_bundle(options.output / "full-size.bundle")
    return ModelBundle.load(options.model or "demo")


def _only(options: argparse.Namespace) -> list[str] | None:
    if options.engines is None:
        return None
    names: list[str] = options.engines.split(",")
    known = CONTENDERS[options.suite]
    if unknown := sorted(set(names) - set(known)):
        raise InputError(
            "argument.engine",
            f"There is no {unknown[0]!r} to measure.",
            hint=f"It is one of: {', '.join(known)}.",
        )
    return names


def _state(
    options: argparse.Namespace, of_cpu: Callable[[int], dict[str, Any]]
) -> Callable[[], dict[str, Any]]:
    if options.suite != "gpu":
        return lambda: of_cpu(options.threads)
    from . import gpu

    return lambda: gpu.state("cuda:0")


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
