"""`mome train | evaluate | synth`: the commands of the training package."""

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

from .config import TrainConfig, load_config
from .evaluate import Case, evaluate, held_out_case, real_cases, table, write_case
from .patches import load_anatomies
from .reproduce import load_tables_config, reproduce
from .stages import train

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are MomeErrors, the caller prints them."""
    args = command_line().parse_args(argv)
    args.run(args)
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError("argument.usage", f"{message}.", hint=f"See `{self.prog} -h`.")


def command_line() -> argparse.ArgumentParser:
    """The parser of the three commands; `run` of what it returns does the work."""
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
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate", help="Dice of a bundle on held-out synthetic cases and on real scans"
    )
    evaluate.add_argument("bundle", metavar="BUNDLE", help='a bundle, or "demo"')
    evaluate.add_argument("--real", type=Path, metavar="DIR", help="folder of the real scans")
    evaluate.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.csv")
    evaluate.set_defaults(run=_evaluate)

    tables = commands.add_parser(
        "tables", help="train and evaluate every system on the synthetic benchmark"
    )
    tables.add_argument("--config", type=Path, required=True, metavar="CONFIG.toml")
    tables.add_argument(
        "--work", type=Path, metavar="DIR", help="benchmark, networks (runs/<name>)"
    )
    tables.add_argument("-o", "--output", type=Path, metavar="DIR", help="training/results/<name>")
    tables.add_argument("--processes", type=int, default=1, metavar="N")
    tables.set_defaults(run=_tables)

    synth = commands.add_parser("synth", help="write held-out synthetic cases as NIfTI")
    synth.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    synth.set_defaults(run=_synth)

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
    bundle = ModelBundle.load(args.bundle)
    cases = _cases(args)
    if args.real is not None:
        cases = chain(cases, real_cases(args.real, bundle))
    print(table(evaluate(bundle, cases, args.output, threads=args.threads)))


def _synth(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    for case in _cases(args):
        write_case(case, args.output)
        print(case.name, case.kind, f"{case.lesion.sum() / 1000:.1f} mL")


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    config = _config(args)
    _, _, evaluation = config.painted
    anatomies = load_anatomies(config, _given_labelmaps(args), held_out=True)
    count = evaluation.cases if args.cases is None else args.cases
    for modality in _names(args.modalities, config):
        for number in range(count):
            yield held_out_case(config, anatomies, modality, number)


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
