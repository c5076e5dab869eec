"""`mome train | evaluate | synth`: the commands of the training package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are MomeErrors, the caller prints them."""
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mome")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train experts, then all networks jointly")
    train.add_argument("config", type=Path, metavar="CONFIG.toml")
    train.add_argument("--labelmaps", type=Path, required=True, metavar="DIR")
    train.add_argument("-o", "--output", type=Path, required=True, metavar="RUN")
    train.add_argument("--stage", choices=("experts", "joint", "all"), default="all")
    train.add_argument("--experts", metavar="A,B", help="only these, in this order")
    train.add_argument("--threads", type=int, metavar="N")
    train.set_defaults(run=_train)
    return parser


def _train(args: argparse.Namespace) -> None:
    import torch

    from .config import load_config
    from .train import train

    if args.threads:
        torch.set_num_threads(args.threads)
    config = load_config(args.config)
    experts = args.experts.split(",") if args.experts else list(config.modalities)
    train(config, args.labelmaps, args.output, stage=args.stage, experts=experts)


if __name__ == "__main__":
    raise SystemExit(main())
