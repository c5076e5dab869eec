"""A checkpoint set to a bundle; pickled code never runs.

Three kinds of folder are read: the six files of a published MoME, one fold of a plain nnU-Net (a
MoME of one expert), and a run folder of our own training. The first two are as nnU-Net 2.2 and the
MoME repository (ZhangxinruBIT/MoME) save them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import MODALITIES, ModelBundle, check_tensors, create_bundle
from mome_sdk.errors import BundleError, InputError

from .graph import write_graph

SETS = ("best", "final", "latest")  # in this order of preference; the authors predict with "best"
_DEEPEST = 3  # folders below the given one: dataset, trainer, fold
# The readers that give arrays (z, y, x), which is S, A, R for an image with axes R, A, S.
_READERS = {"SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"}

# Training logs hold NumPy scalars. What rebuilds them goes by two names, NumPy 2's and NumPy 1's.
_scalar = np.float32(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]


def import_checkpoint(folder: str | Path, out: str | Path, which: str | None = None) -> ModelBundle:
    """Make a bundle of a checkpoint set.

    Args:
        folder: The folder of `checkpoint_best.pth` (the gating network, or a plain nnU-Net) and
            `checkpoint_best1.pth` .. `5.pth` (the experts), or one up to three folders above it;
            or a run folder of `mome train`.
        out: Folder or .zip to write; it must not exist.
        which: Set of files: "best", "final" or "latest"; None takes the first of these that is
            there. The bundle says which it was.

    Returns:
        The bundle. Nothing in the files says which expert is which: the modalities are assigned in
        the order of the file numbers, and the bundle records that. A stock nnU-Net cuts images to
        their nonzero box before it normalises them; this package does not.

    Raises:
        BundleError: `bundle.not-found`, `bundle.no-checkpoint`, `bundle.ambiguous`,
            `bundle.missing-file`, `bundle.unknown-file`: not one whole set; `bundle.unreadable`,
            `bundle.unsafe-pickle`, `bundle.checkpoint`: a file is cut off, would run code, or
            holds something else; `bundle.identical-experts`; `bundle.alias`, `bundle.not-finite`,
            `bundle.tensors`: weights contradict each other, are not numbers, or do not fit;
            `bundle.plans`, `bundle.run`: the description is missing or of a network, grid or
            normalisation that this package does not have.
        InputError: `argument.set`; `argument.output`, `argument.output-folder`.
    """
    folder = Path(folder)
    if which is not None and which not in SETS:
        raise InputError(
            "argument.set", f"The set is {which!r}.", hint=f"It is one of: {', '.join(SETS)}."
        )
    if not folder.is_dir():
        raise BundleError(
            "bundle.not-found",
            f"There is no folder {folder}.",
            hint="Give the folder of a checkpoint set or of a training run.",
        )
    if (folder / "run.json").is_file():
        return _import_run(folder, out)
    folder = _set_folder(folder)
    paths = _set_files(folder, which or _first_set(folder))
    checkpoints = [_read_checkpoint(path) for path in paths]
    return _bundle_of(folder, checkpoints, out)


# ---- which files


def _set_folder(folder: Path) -> Path:
    """The one folder, here or below, that holds a checkpoint without a number."""
    names = [f"checkpoint_{name}.pth" for name in SETS]
    for depth in range(_DEEPEST + 1):
        found = {p.parent for name in names for p in folder.glob("*/" * depth + name)}
        if len(found) > 1:
            raise BundleError(
                "bundle.ambiguous",
                f"{len(found)} folders below {folder} hold checkpoints: "
                f"{', '.join(sorted(path.name for path in found))}.",
                hint="Give one of them.",
            )
        if found:
            return found.pop()
    numbered = any(folder.glob("checkpoint_*[0-9].pth"))
    raise BundleError(
        "bundle.missing-file" if numbered else "bundle.no-checkpoint",
        f"{folder} holds none of {', '.join(names)}.",
        hint="The gating network is in it: copy the whole set of six files."
        if numbered
        else "Give the folder of a checkpoint set or of a training run.",
    )


def _first_set(folder: Path) -> str:
    return next(name for name in SETS if (folder / f"checkpoint_{name}.pth").exists())


def _set_files(folder: Path, which: str) -> list[Path]:
    """Gating network, then the experts by number; a plain nnU-Net is one file."""
    pattern = re.compile(rf"checkpoint_{which}(\d*)\.pth")
    numbers = {m[1] for path in folder.iterdir() if (m := pattern.fullmatch(path.name))}
    expected = {"", *(str(i + 1) for i in range(len(MODALITIES)))}
    if numbers == {""}:
        expected = {""}
    if missing := sorted(expected - numbers):
        raise BundleError(
            "bundle.missing-file",
            f"checkpoint_{which}{missing[0]}.pth is missing in {folder}.",
            hint=f"A set is the gating network and {len(MODALITIES)} numbered experts: copy all.",
        )
    if extra := sorted(numbers - expected):
        raise BundleError(
            "bundle.unknown-file",
            f"checkpoint_{which}{extra[0]}.pth in {folder} is not of a set.",
            hint=f"A set is the gating network and experts 1 to {len(MODALITIES)}.",
        )
    return [folder / f"checkpoint_{which}{number}.pth" for number in sorted(expected)]


# ---- what is in them


@dataclass(frozen=True)
class _Checkpoint:
    """One .pth file: its distinct weights under published names, and the rest of its dict."""

    path: Path
    sha256: str
    weights: dict[str, NDArray[np.float32]]
    rest: Mapping[str, Any]


def _read_checkpoint(path: Path) -> _Checkpoint:
    """Read tensors and plain values; the tensors stay in the mapped file until they are used."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if not zipfile.is_zipfile(path):
            raise EOFError("it has no end, or is no PyTorch file")
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise BundleError(
            "bundle.unsafe-pickle",
            f"{path.name} holds more than tensors and plain values: {_first_line(error)}",
            hint="It was not run. Get the file from its authors again.",
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(
            "bundle.unreadable",
            f"{path.name} cannot be read: {_first_line(error)}.",
            hint="It was cut off or is no checkpoint: copy it again.",
        ) from error
    state = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(content.get("init_args"), dict):
        raise BundleError(
            "bundle.checkpoint",
            f"{path.name} holds no network_weights and init_args.",
            hint="Give files that nnU-Net 2 or MoME saved.",
        )
    rest = {key: value for key, value in content.items() if key != "network_weights"}
    return _Checkpoint(path, digest.hexdigest(), _distinct_weights(state, path.name), rest)


def _distinct_weights(state: Mapping[Any, Any], file: str) -> dict[str, NDArray[np.float32]]:
    """Each weight once. The files repeat the encoder below the decoder, and convolutions and norms
    below `all_modules`; a repetition must be the same tensor.
    """
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise BundleError(
                "bundle.checkpoint",
                f"{str(key)[:100]} in {file} is no tensor of numbers.",
                hint="Give files that nnU-Net 2 or MoME saved.",
            )
        name = _published_name(str(key))
        known = weights.setdefault(name, tensor)
        same_memory = known.data_ptr() == tensor.data_ptr() and known.shape == tensor.shape
        if not (same_memory or torch.equal(known, tensor)):
            raise BundleError(
                "bundle.alias",
                f"{key} in {file} differs from {name}, of which it is a copy.",
                hint="The file was altered: get it from its authors again.",
            )
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(
                "bundle.not-finite",
                f"{name} in {file} holds NaN or infinite weights.",
                hint="The training diverged, or the file was altered.",
            )
    return {name: tensor.detach().numpy() for name, tensor in weights.items()}


def _published_name(key: str) -> str:
    """The name of which `key` may be an alias; compiled and parallel runs add a prefix."""
    key = key.removeprefix("module.").removeprefix("_orig_mod.")
    if key.startswith("decoder.encoder."):
        key = key.removeprefix("decoder.")
    return key.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")


def _check_different(checkpoints: Iterable[_Checkpoint]) -> None:
    """Refuse copies: the published loader fell back to one file for all experts without a word."""
    seen: dict[str, str] = {}
    for checkpoint in checkpoints:
        digest = hashlib.sha256()
        for name, tensor in sorted(checkpoint.weights.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor).data)
        first = seen.setdefault(digest.hexdigest(), checkpoint.path.name)
        if first != checkpoint.path.name:
            raise BundleError(
                "bundle.identical-experts",
                f"{first} and {checkpoint.path.name} hold the same weights.",
                hint="Each network of a set has its own: copy the six files again.",
            )


# ---- the bundle


def _bundle_of(folder: Path, checkpoints: list[_Checkpoint], out: str | Path) -> ModelBundle:
    _check_different(checkpoints)
    first, *experts = checkpoints
    plans = _description(folder, "plans.json", first.rest["init_args"].get("plans"))
    dataset = _description(folder, "dataset.json", first.rest["init_args"].get("dataset_json"))
    configuration = _configuration(plans, first.rest["init_args"].get("configuration"))
    channels, classes = _channels(dataset), _classes(dataset)
    architecture = _architecture(configuration, len(classes), len(experts) or 1)
    _check_preparation(plans, configuration)
    tensors: dict[str, NDArray[np.float32]] = {}
    for i, expert in enumerate(experts or [first]):
        tensors |= {f"experts.{i}.{name}": tensor for name, tensor in expert.weights.items()}
    if experts:
        tensors |= {f"gate.{name}": tensor for name, tensor in first.weights.items()}
    check_tensors(tensors, architecture)
    training = {
        "source": "MoME checkpoint set" if experts else "nnU-Net fold",
        "expert_order": "order by file number" if experts else "one expert",
        "files": {checkpoint.path.name: checkpoint.sha256 for checkpoint in checkpoints},
        "trainer": str(first.rest.get("trainer_name")),
        "epoch": int(first.rest.get("current_epoch", 0)),
        "dataset": str(plans.get("dataset_name")),
    }
    return create_bundle(
        out,
        architecture,
        {name: tensors[name] for name in architecture.tensor_shapes()},
        name=f"{'MoME' if experts else 'nnU-Net'} {plans.get('dataset_name', '')}".strip(),
        patch=[int(edge) for edge in configuration["patch_size"]],
        blend="authors",
        training=training,
        modalities=MODALITIES if experts else channels,
        classes=classes,
        mirror_axes=first.rest.get("inference_allowed_mirroring_axes") or (),
        licence="not stated in the checkpoint: see where it came from",
        graph=write_graph,
    )


def _import_run(folder: Path, out: str | Path) -> ModelBundle:
    """The joint network of a run folder; run.json was written by `mome train`."""
    weights = folder / "joint" / "checkpoint.safetensors"
    if not weights.is_file():
        raise BundleError(
            "bundle.missing-file",
            f"{folder} has no joint/{weights.name}.",
            hint="The run is not finished: go on with `mome train`.",
        )
    record = _read_json(folder / "run.json", code="bundle.run")
    optional = {key: record[key] for key in ("licence", "notice") if key in record}
    tensors, _ = _core.read_safetensors(weights)
    try:
        architecture = Architecture.from_json(record["architecture"])
        fields = {key: record[key] for key in ("name", "patch", "modalities", "training")}
    except (InputError, KeyError) as error:
        raise BundleError(
            "bundle.run",
            f"run.json does not describe a run: {_first_line(error)}",
            hint="Name, architecture, patch, modalities and training are expected.",
        ) from error
    return create_bundle(
        out, architecture, tensors, blend="exact", graph=write_graph, **fields, **optional
    )


# ---- plans and data set


def _description(folder: Path, name: str, inside: object) -> Mapping[str, Any]:
    """plans.json or dataset.json: beside the files, one folder up, or kept in the checkpoint."""
    for path in (folder / name, folder.parent / name):
        if path.is_file():
            return _read_json(path, code="bundle.plans")
    if not isinstance(inside, dict):
        raise _bad_plans(f"There is no {name}", "It lies one folder above the checkpoints")
    return inside


def _read_json(path: Path, code: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            code, f"{path} cannot be read: {_first_line(error)}.", hint="Copy it again."
        ) from error
    if not isinstance(content, dict):
        raise BundleError(code, f"{path} is no JSON object.", hint="Copy it again.")
    return content


def _bad_plans(found: str, expected: str) -> BundleError:
    return BundleError("bundle.plans", f"{found}.", hint=f"{expected}.")


def _configuration(plans: Mapping[str, Any], name: object) -> dict[str, Any]:
    """A configuration with what it inherits."""
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or name not in configurations:
        raise _bad_plans(
            f"The plans have no configuration {str(name)[:50]!r}",
            "Give the plans.json that the checkpoint was trained with",
        )
    merged: dict[str, Any] = {}
    for _ in configurations:
        merged = {**configurations[name], **merged}
        name = configurations[name].get("inherits_from")
        if name not in configurations:
            break
    return merged


def _architecture(configuration: Mapping[str, Any], classes: int, experts: int) -> Architecture:
    """Sizes as nnU-Net 2.2 writes them, or as 2.4 and later do (`architecture`)."""
    try:
        if "architecture" in configuration:
            kind = configuration["architecture"]["network_class_name"].rpartition(".")[2]
            sizes = configuration["architecture"]["arch_kwargs"]
            features = sizes["features_per_stage"]
            encoder_convs = sizes["n_conv_per_stage"]
            kernels, strides = sizes["kernel_sizes"], sizes["strides"]
        else:
            kind = configuration["UNet_class_name"]
            sizes = configuration
            kernels, strides = sizes["conv_kernel_sizes"], sizes["pool_op_kernel_sizes"]
            base, most = sizes["UNet_base_num_features"], sizes["unet_max_num_features"]
            features = [min(base * 2**s, most) for s in range(len(strides))]
            encoder_convs = sizes["n_conv_per_stage_encoder"]
        decoder_convs = sizes["n_conv_per_stage_decoder"]
        if kind != "PlainConvUNet" or any(list(kernel) != [3, 3, 3] for kernel in kernels):
            raise _bad_plans(
                f"The network is a {kind} with kernels {kernels}",
                "A PlainConvUNet with kernels 3x3x3 is expected",
            )
        if any(len(set(stride)) != 1 for stride in strides):
            raise _bad_plans(f"The strides are {strides}", "Equal strides per stage are expected")
        return Architecture(
            features=tuple(features),
            strides=tuple(stride[0] for stride in strides),
            encoder_convs=tuple(encoder_convs),
            decoder_convs=tuple(decoder_convs),
            classes=classes,
            experts=experts,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _bad_plans(
            f"The plans lack a size of the network: {_first_line(error)}",
            "Give the plans.json that the checkpoint was trained with",
        ) from error
    except InputError as error:
        raise _bad_plans(error.message.removesuffix("."), error.hint.removesuffix(".")) from error


def _check_preparation(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Refuse plans whose images would need another preparation than this package's."""
    rules: dict[str, tuple[Any, list[Any]]] = {
        "transpose_forward": (plans.get("transpose_forward"), [[0, 1, 2]]),
        "image_reader_writer": (plans.get("image_reader_writer"), sorted(_READERS)),
        "spacing": (configuration.get("spacing"), [[1.0, 1.0, 1.0]]),
        "normalization_schemes": (
            configuration.get("normalization_schemes"),
            [["ZScoreNormalization"]],
        ),
        "use_mask_for_norm": (configuration.get("use_mask_for_norm"), [[False]]),
    }
    for name, (found, accepted) in rules.items():
        if found not in accepted:
            raise _bad_plans(
                f"{name} is {str(found)[:100]}",
                f"{' or '.join(map(str, accepted))} is what this package prepares images for",
            )
    patch = configuration.get("patch_size")
    if not isinstance(patch, list | tuple) or len(patch) != 3:
        raise _bad_plans(f"patch_size is {str(patch)[:100]}", "Three numbers are expected")


def _channels(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    channels = dataset.get("channel_names")
    if not isinstance(channels, dict) or list(channels) != ["0"]:
        raise _bad_plans(f"channel_names is {str(channels)[:100]}", "One image channel is expected")
    return (str(channels["0"]),)


def _classes(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes; nnU-Net's label `ignore` is none."""
    labels = dataset.get("labels")
    known = {k: v for k, v in labels.items() if k != "ignore"} if isinstance(labels, dict) else {}
    names = {value: name for name, value in known.items() if type(value) is int}
    if len(names) != len(known) or sorted(names) != list(range(max(len(known), 2))):
        raise _bad_plans(f"The labels are {str(labels)[:100]}", "Whole numbers 0, 1, ... for names")
    return tuple(str(names[value]) for value in sorted(names))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
