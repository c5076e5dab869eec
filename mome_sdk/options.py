"""What users type: the options of `mome` and their help."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from mome_sdk.engines import ENGINES
from mome_sdk.errors import InputError
from mome_sdk.exported import ARTEFACTS, EXPERTS, PRECISIONS
from mome_sdk.nifti import NOTICE
from mome_sdk.preprocess.pipeline import SPACES
from mome_sdk.preprocess.register import METHODS
from mome_sdk.segmenter import MIRRORS

# Commands of the training package, which reads their options itself.
TRAINING = {
    "train": "train experts and then the mixture, from a TOML file",
    "evaluate": "measure a bundle on held-out synthetic cases and real scans",
    "synth": "write synthetic cases with their lesions",
}
# Likewise of the benchmarks.
BENCH = {"bench": "measure this machine: engines, kernels, sliding windows, end to end, GPU"}
# Which series of a DICOM study can be asked for, and what can be written for it.
SERIES = ("t1", "t1ce", "t2", "flair", "dwi", "auto")
FORMATS = ("nifti", "seg", "sr", "sc")
COMMON = ("-v", "--verbose", "--debug")


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(
            "argument.usage", f"{message[:1].upper()}{message[1:]}.", hint=f"See `{self.prog} -h`."
        )


def parser() -> argparse.ArgumentParser:
    """The parser of everything but the commands of TRAINING and BENCH, which it only lists."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("-v", "--verbose", action="store_true", help="say more on standard error")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    whole = _Parser(
        prog="mome",
        parents=[common],
        description=f"Brain lesion masks from one MR image of any modality. {NOTICE}.",
        epilog="Exit status: 0 done; 2 wrong usage or unusable input, said in one line; 3 some of "
        "several inputs failed; 130 interrupted; 1 a mistake of ours.",
    )
    whole.add_argument("--version", action="version", version=f"mome {version('mome-sdk')}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, summary: str) -> _Parser:
        description = f"{summary[:1].upper()}{summary[1:]}."
        command: _Parser = commands.add_parser(
            name, parents=[common], help=summary, description=description, allow_abbrev=False
        )
        return command

    demo = add("demo", "segment the bundled example with the bundled demonstration model")
    demo.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("demo-out"),
        help="folder for mask, picture and report (default: demo-out)",
    )
    _add_predict_options(add("predict", "find lesions in brain MR images"))
    importing = add("import", "turn the authors' checkpoint files, or a run, into a bundle")
    importing.add_argument("folder", metavar="DIR", type=Path, help="the folder of the files")
    importing.add_argument(
        "-o",
        "--output",
        metavar="BUNDLE",
        type=Path,
        required=True,
        help="folder or .zip to write",
    )
    importing.add_argument(
        "--set",
        metavar="NAME",
        choices=("best", "final", "latest"),
        help="the authors' set to take: best, final or latest (default: the first that is there)",
    )
    _add_export_options(add("export", "compile a bundle for an engine, or check an export"))
    inspect = add("inspect", "say what a bundle or an export is: shapes, sha256, parity")
    inspect.add_argument("path", metavar="PATH", help="bundle or export folder, .zip, or demo")
    serve = add("serve", "run a DICOM node and an HTTP service")
    serve.add_argument("config", metavar="CONFIG.toml", type=Path, help="see docs/pacs.md")
    add("doctor", "say what this machine offers, what is missing and how to add it")
    for name, summary in {**TRAINING, **BENCH}.items():
        commands.add_parser(name, help=summary)
    return whole


def _add_export_options(export: _Parser) -> None:
    export.usage = "mome export BUNDLE --target NAME -o DIR [options], or mome export --check DIR"
    option = export.add_argument
    option("bundle", metavar="BUNDLE", nargs="?", help="bundle folder or .zip, or demo")
    option(
        "--target",
        metavar="NAME",
        choices=tuple(ARTEFACTS),
        help=f"what to compile for: {', '.join(ARTEFACTS)}",
    )
    option("-o", "--output", metavar="DIR", type=Path, help="folder to write; it must not exist")
    option(
        "--precision",
        metavar="NAME",
        choices=PRECISIONS,
        default="fp32",
        help="fp32 (default); or fp16, with norms, fusion and what might overflow in fp32",
    )
    option(
        "--experts",
        metavar="NAME",
        choices=EXPERTS,
        default="grouped",
        help="grouped (default): one network of grouped convolutions; separate: one after the "
        "other. Which is faster depends on the GPU: measure both",
    )
    option(
        "--batch",
        type=int,
        default=None,
        metavar="N",
        help="windows of every call (default: any number, but 1 for TensorRT)",
    )
    option(
        "--sm",
        type=int,
        action="append",
        default=None,
        metavar="N",
        help="for TensorRT: a compute capability that the plan must run on, 80 for an A100; may be "
        "given several times (default: the GPU of this machine). TensorRT-RTX needs no GPU here",
    )
    option(
        "--timing-cache",
        type=Path,
        default=None,
        metavar="FILE",
        help="for the target tensorrt: keep here what was measured, so that the next plan for this "
        "GPU takes less time",
    )
    option(
        "--check",
        metavar="DIR",
        type=Path,
        help="measure the parity of this export again, here; nothing is written",
    )


def _add_predict_options(predict: _Parser) -> None:
    predict.usage = "mome predict INPUT... -o OUT [options]"
    predict.formatter_class = argparse.RawDescriptionHelpFormatter
    predict.description = (
        "Find lesions in brain MR images; each mask lies on the grid of its own image.\n"
        "INPUT is a NIfTI file (.nii, .nii.gz) of one modality: T1, T1ce, T2, FLAIR or DWI.\n"
        "Or many of them: a folder or a list of images; or a DICOM study: a folder or a .zip. See\n"
        "below."
    )
    predict.epilog = (
        "A folder is searched at any depth, but for hidden files. Of a BIDS dataset the T1w, T2w\n"
        "and FLAIR images in anat and single-volume dwi images are taken, none from derivatives\n"
        "and sourcedata. A list is a .txt file with a path in each line, or a .csv file with the\n"
        "column image; paths start from the list's folder. OUT repeats the tree of the images\n"
        "(BIDS: sub-1/anat/sub-1_space-T1w_desc-lesion_mask.nii.gz) and has a row for each image\n"
        "in results.csv. The same command again does what is not done yet and images that have\n"
        "changed; an image that was refused for what it is waits until it changes.\n\n"
        "A folder with DICOM files and no NIfTI file is one study, and so is a .zip of it. One of\n"
        "its series is segmented, in its own slices; OUT is a folder then (lesions.nii.gz,\n"
        "lesions_seg.dcm, lesions_sr.dcm, lesions_sc.dcm), or the mask's file for NIfTI alone."
    )
    option = predict.add_argument
    option(
        "inputs",
        metavar="INPUT",
        type=Path,
        nargs="+",
        help="one image or several; or one folder or list (.txt, .csv)",
    )
    option(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help="mask to write, for one image; a folder, for several: OUT/NAME.nii.gz for each. "
        "What is there already is replaced, but never an INPUT",
    )
    option(
        "--model",
        metavar="MODEL",
        default="demo",
        help="bundle folder or .zip, or export folder (default: the bundled demonstration model)",
    )
    option(
        "--space",
        metavar="NAME",
        choices=SPACES,
        default="native",
        help="native (default): as the scanner made it, registered here; mni: registered to "
        "MNI152, any grid; model: on the model's grid, already cropped",
    )
    option(
        "--registration",
        metavar="NAME",
        choices=METHODS,
        default="niimath",
        help="the program that registers: niimath (default), sitk, or ants as published (one to "
        "two minutes)",
    )
    option(
        "--reference",
        metavar="SCAN",
        type=Path,
        help="register this image of the same session (best a T1 with thin slices) and apply it "
        "to every INPUT",
    )
    option(
        "--brain-mask",
        metavar="FILE",
        type=Path,
        help="the brain, not 0 inside, in the space of the INPUT (of SCAN with --reference)",
    )
    option(
        "--force",
        action="store_true",
        help="go on where a check of registration or brain says no; the result records it",
    )
    option(
        "--engine",
        metavar="NAME",
        choices=("auto", *ENGINES),
        default="auto",
        help=f"auto (default): the fastest present; or {', '.join(ENGINES)}",
    )
    option(
        "--device",
        metavar="NAME",
        default="cpu",
        help="cpu (default), or cuda:0 with the engines torch and tensorrt",
    )
    option(
        "--precision",
        metavar="NAME",
        choices=("fp32", "bf16", "fp16"),
        default=None,
        help="fp32 (default), bf16 where engine and processor have it, or fp16 with the torch "
        "engine on cuda:0; an export has its own",
    )
    option(
        "--mirror",
        metavar="NAME",
        choices=tuple(MIRRORS),
        default="none",
        help="none (default); all: average the 8 mirrored copies, as the authors do: 8 times "
        "the work",
    )
    option(
        "--step",
        type=float,
        default=0.5,
        metavar="S",
        help="distance of windows in parts of the patch, over 0 to 1 (default: 0.5)",
    )
    option(
        "--blend",
        metavar="NAME",
        choices=("exact", "authors"),
        default=None,
        help="window weights: exact, or the authors' half-precision ones (default: what the "
        "bundle says)",
    )
    option(
        "--batch",
        type=_batch,
        default="auto",
        metavar="N",
        help="windows per call of the engine, or auto (default)",
    )
    option(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="most threads (default: MOME_THREADS, or all cores)",
    )
    option(
        "--probability",
        action="store_true",
        help="also write the lesion probability, NAME_probability.nii.gz",
    )
    option(
        "--report",
        action="store_true",
        help="also write a picture, NAME.png, and a report, NAME.html",
    )
    option(
        "--json",
        action="store_true",
        help="print one JSON object per image on standard output, and nothing else",
    )
    option(
        "--ray",
        type=int,
        default=None,
        metavar="N",
        help="for a folder or a list: N processes of Ray, each with its own model, on the cluster "
        "of RAY_ADDRESS or else on this machine; they share cores and GPUs evenly, and paths "
        "must mean the same files on every machine",
    )
    _add_dicom_options(predict.add_argument_group("DICOM"))


def _add_dicom_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option(
        "--series",
        metavar="NAME",
        choices=SERIES,
        help="t1, t1ce, t2, flair or dwi; auto (default): the first of flair, t1ce, t2, dwi and "
        "t1 that the study has",
    )
    option(
        "--format",
        metavar="LIST",
        type=_formats,
        help="what to write, separated by commas: nifti (default), seg (DICOM SEG on the slices of "
        "the series), sr (structured report, TID 1500), sc (a picture)",
    )
    option(
        "--segments",
        metavar="NAME",
        choices=("lesion", "all"),
        help="segments of the SEG: lesion (default), one for each; or all, one for all lesions",
    )
    option(
        "--empty-seg",
        action="store_true",
        help="write a SEG even where no lesion was found; an SR is always written, with a count of "
        "0 then",
    )
    option(
        "--series-rules",
        metavar="FILE",
        type=Path,
        help="rules of your own, over the built-in ones, for which series is what (TOML)",
    )


def _formats(text: str) -> tuple[str, ...]:
    asked = text.lower().split(",")
    unknown = [name for name in asked if name not in FORMATS]
    if unknown or len(set(asked)) < len(asked):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(FORMATS)}")
    return tuple(asked)


def _batch(text: str) -> int | str:
    return text if text == "auto" else int(text)
