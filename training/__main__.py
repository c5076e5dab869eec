"""`mome train | evaluate | synth | prepare`, and what only `python -m mome_sdk.training` has."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import InputError
from mome_sdk.files import write_file
from mome_sdk.settings import build, read_toml

from .benchmark import BenchmarkConfig, counts, make_benchmark
from .config import TrainConfig, load_config
from .dataset import read_table, write_table
from .evaluate import (
    Case,
    card,
    evaluate,
    held_out_case,
    lesion_free_case,
    real_cases,
    table,
    write_case,
)
from .figures import FIGURES
from .patches import load_anatomies
from .pictures import write_pages
from .preparers import LAYOUTS, prepare_dataset
from .published import write_published
from .reproduce import load_tables_config, reproduce
from .stages import train
from .tables import TABLES
from .tables import write_table as write_results_table

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are MomeErrors, the caller prints them."""
    args = command_line().parse_args(argv)
    args.action(args)
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError("argument.usage", f"{message}.", hint=f"See `{self.prog} -h`.")


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands; `action` of what it returns does the work."""
    parser = _Parser(prog="mome")
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="train experts, gate, then all networks jointly")
    train.add_argument("config", type=Path, metavar="CONFIG.toml")
    train.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="label maps, or the case table"
    )
    train.add_argument("-o", "--output", type=Path, required=True, metavar="RUN")
    train.add_argument("--stage", choices=("experts", "gate", "joint", "all"), default="all")
    train.add_argument("--experts", metavar="A,B", help="only these, in this order")
    train.set_defaults(action=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="judge a bundle on held-out heads and real scans; tables and figures of a benchmark",
    )
    evaluate.add_argument(
        "run", nargs="?", default="demo", metavar="RUN",
        help="a bundle (default: the demonstration model), or a folder that `tables` wrote",
    )  # fmt: skip
    what = evaluate.add_mutually_exclusive_group()
    what.add_argument("--demo", action="store_true", help="the demonstration model")
    what.add_argument("--table", choices=tuple(TABLES), help="of RUN/results.csv, again")
    what.add_argument("--figure", choices=tuple(FIGURES), help="of RUN, again")
    evaluate.add_argument(
        "--real", type=Path, default=os.environ.get("MOME_TEST_DATA"), metavar="DIR",
        help="folder of the real scans (default: $MOME_TEST_DATA)",
    )  # fmt: skip
    evaluate.add_argument(
        "-o", "--output", type=Path, default=Path("evaluation.csv"), metavar="RESULTS.csv",
        help="a case that stands in it is not run again; the model card goes beside it",
    )  # fmt: skip
    evaluate.set_defaults(action=_evaluate)

    tables = commands.add_parser(
        "tables", help="train and evaluate every system on the synthetic benchmark"
    )
    tables.add_argument("--config", type=Path, required=True, metavar="CONFIG.toml")
    tables.add_argument(
        "--work", type=Path, metavar="DIR", help="benchmark, networks (runs/<name>)"
    )
    tables.add_argument("-o", "--output", type=Path, metavar="DIR", help="training/results/<name>")
    tables.add_argument("--processes", type=int, default=1, metavar="N")
    tables.set_defaults(action=_tables)

    published = commands.add_parser(
        "published", help="write a finished run as the MoME authors' six files"
    )
    published.add_argument("run", type=Path, metavar="RUN")
    published.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    published.set_defaults(action=lambda args: print(write_published(args.run, args.output)))

    prepare = commands.add_parser(
        "prepare", help="make a case table of public data sets as they are downloaded"
    )
    prepare.add_argument("layout", choices=tuple(LAYOUTS), metavar="LAYOUT")
    prepare.add_argument("root", type=Path, metavar="DIR", help="where it was unpacked")
    prepare.add_argument("-o", "--output", type=Path, required=True, metavar="CASES.csv")
    prepare.set_defaults(action=_prepare)

    synth = commands.add_parser(
        "synth", help="write the synthetic benchmark, or held-out cases of the demonstration"
    )
    synth.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    synth.set_defaults(action=_synth)

    for command in (evaluate, synth, tables):
        command.add_argument(
            "--labelmaps",
            type=Path,
            default=_labelmaps(),
            metavar="DIR",
            help="the label maps (README); $MOME_TEST_DATA/labelmaps",
        )
    for command in (evaluate, synth):
        command.add_argument("--config", type=Path, default=DEMO_CONFIG, metavar="CONFIG.toml")
        command.add_argument("--modalities", metavar="A,B", help="only these")
        command.add_argument("--cases", type=int, metavar="N", help="of each modality")
    for command in (train, evaluate, synth):
        command.add_argument("--threads", type=int, metavar="N")
    return parser


def _labelmaps() -> Path | None:
    data = os.environ.get("MOME_TEST_DATA")
    return Path(data) / "labelmaps" if data else None


def _given_labelmaps(args: argparse.Namespace) -> Path:
    if args.labelmaps is None:
        raise InputError(
            "argument.labelmap",
            "Where the label maps are is not said.",
            hint="Name their folder with --labelmaps.",
        )
    folder: Path = args.labelmaps
    return folder


def _tables(args: argparse.Namespace) -> None:
    config = load_tables_config(args.config)
    name = args.config.stem
    reproduce(
        config,
        _given_labelmaps(args),
        args.work or Path("runs") / name,
        args.output or Path("training/results") / name,
        processes=args.processes,
    )


def _config(args: argparse.Namespace) -> TrainConfig:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return load_config(args.config)


def _train(args: argparse.Namespace) -> None:
    config = _config(args)
    experts = _names(args.experts, config) if args.experts else config.expert_order()
    train(config, args.data, args.output, stage=args.stage, experts=experts)


def _evaluate(args: argparse.Namespace) -> None:
    if args.table is not None:
        print(write_results_table(Path(args.run), args.table).markdown().decode())
        return
    if args.figure is not None:
        FIGURES[args.figure](Path(args.run))
        return
    bundle = ModelBundle.load("demo" if args.demo else args.run)
    modalities = _names(args.modalities, _config(args))
    cases: Iterator[Case] = chain(_cases(args), _cases(args, free=True))
    if args.real is not None:
        cases = chain(cases, real_cases(Path(args.real), bundle, modalities))
    rows = evaluate(bundle, cases, args.output, threads=args.threads)
    write_file(args.output.with_suffix(".md"), card(bundle, rows).encode())
    print(table(rows))


def _prepare(args: argparse.Namespace) -> None:
    """Rows of other data sets that stand in the table already are kept."""
    known = read_table(args.output) if args.output.exists() else ()
    labels = args.output.with_suffix("") / "labels"
    scans = prepare_dataset(args.layout, args.root.resolve(), labels.resolve())
    others = [scan for scan in known if scan.dataset != args.layout]
    write_table([*others, *scans], args.output)
    print(f"{len(scans)} images of {args.layout}, {len(others) + len(scans)} in all")


def _synth(args: argparse.Namespace) -> None:
    table = read_toml(args.config)
    if "benchmark" in table:
        config = build(BenchmarkConfig, table["benchmark"], str(args.config))
        scans = make_benchmark(config, _given_labelmaps(args), args.output)
        write_pages(scans, args.output / "pictures")
        print("\n".join(counts(scans)))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for case in _cases(args):
        write_case(case, args.output)
        print(case.name, case.kind, f"{case.lesion.sum() / 1000:.1f} mL")


def _cases(args: argparse.Namespace, *, free: bool = False) -> Iterator[Case]:
    make = lesion_free_case if free else held_out_case
    config = _config(args)
    _, _, evaluation = config.painted
    anatomies = load_anatomies(config, _given_labelmaps(args), held_out=True)
    count = evaluation.cases if args.cases is None else args.cases
    count = (count + 1) // 2 if free else count
    for modality in _names(args.modalities, config):
        for number in range(count):
            yield make(config, anatomies, modality, number)


def _names(text: str | None, config: TrainConfig) -> list[str]:
    names = list(config.modalities) if text is None else text.split(",")
    if unknown := sorted(set(names) - set(config.modalities)):
        raise InputError(
            "argument.modality",
            f"{unknown[0]!r} is not a modality of this configuration.",
            hint=f"It has: {', '.join(config.modalities)}.",
        )
    return names


if __name__ == "__main__":
    raise SystemExit(main())
