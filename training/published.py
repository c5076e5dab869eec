"""A finished run as the MoME authors' six files, which their code and nnU-Net's can load.

The layout is that of the MoME repository (revision 8758a8f): the gating network in
`checkpoint_best.pth`, the experts in `checkpoint_best1..5.pth`, plans.json and dataset.json one
folder up. Only the weights are carried: a training cannot be continued from them.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.files import make_folders, write_file

from .train import load_weights

DATASET = "Dataset001_MoME"
TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"
RESAMPLING = "resample_data_or_seg_to_shape"


def write_published(run: Path, out: Path) -> Path:
    """Write the six files, plans.json and dataset.json below `out`; returns the folder of the six.

    Raises:
        InputError: `argument.run`, the run is not finished; `argument.config`, its numbers cannot
            be said in nnU-Net 2.2's plans: features that do not double up to a limit, one
            expert, or several image channels.
        BundleError: `bundle.missing`, the joint stage is not finished.
    """
    record = _record(run)
    arch = Architecture.from_json(record["architecture"])
    weights = load_weights(run / "joint" / "checkpoint", "The joint network")
    plans, dataset = plans_of(arch, record["patch"]), _dataset()
    folder = out / DATASET / TRAINER / "fold_MoME"
    make_folders(folder)
    for name, content in (("plans.json", plans), ("dataset.json", dataset)):
        write_file(folder.parent / name, (json.dumps(content, indent=1) + "\n").encode())
    networks = {"": "gate.", **{str(i + 1): f"experts.{i}." for i in range(arch.experts)}}
    for number, prefix in networks.items():
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        checkpoint = _checkpoint(with_aliases(state), plans, dataset)
        if not number:
            checkpoint |= {"optimizer_state": {}, "grad_scaler_state": None}
        data = io.BytesIO()
        torch.save(checkpoint, data)
        write_file(folder / f"checkpoint_best{number}.pth", data.getvalue())
    return folder


def _record(run: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((run / "run.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            "argument.run",
            f"{run} has no run.json that can be read: {error}.",
            hint="Name the folder of a finished `mome train`.",
        ) from error
    return record


def with_aliases(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The tensors under all the names that nnU-Net 2.2 saves them with, in its order.

    Convolutions and norms stand below `all_modules` a second time, and the encoder below the
    decoder.
    """
    order = ("encoder.", "decoder.encoder.", "decoder.stages.", "decoder.transpconvs.")
    named: OrderedDict[str, Tensor] = OrderedDict()
    for prefix in (*order, "decoder.seg_layers."):
        own = prefix.replace("decoder.encoder.", "encoder.")
        blocks: dict[str, list[str]] = {}
        for key in (key for key in state if key.startswith(own)):
            block = key.partition(".conv.")[0].partition(".norm.")[0]
            blocks.setdefault(block, []).append(key)
        for keys in blocks.values():
            saved = {key.replace(own, prefix, 1): state[key] for key in keys}
            named.update(saved)
            for number, part in enumerate(("conv", "norm")):
                for key, value in saved.items():
                    if f".{part}." in key:
                        named[key.replace(f".{part}.", f".all_modules.{number}.")] = value
    return named


def _checkpoint(
    state: Mapping[str, Tensor], plans: dict[str, Any], dataset: dict[str, Any]
) -> dict[str, Any]:
    return {
        "network_weights": state,
        "logging": {},
        "_best_ema": np.float32(0),
        "current_epoch": 0,
        "init_args": {
            "plans": plans,
            "configuration": "3d_fullres",
            "fold": "MoME",
            "dataset_json": dataset,
            "unpack_dataset": False,
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def plans_of(arch: Architecture, patch: list[int]) -> dict[str, Any]:
    """nnU-Net 2.2's plans with the 3d_fullres configuration alone.

    Raises:
        InputError: `argument.config`, see `write_published`.
    """
    base, most = arch.features[0], max(arch.features)
    regular = tuple(min(base * 2**stage, most) for stage in range(arch.stages))
    if arch.features != regular or arch.in_channels != 1 or arch.experts != 5:
        raise InputError(
            "argument.config",
            f"The network has features {arch.features}, {arch.in_channels} channels and "
            f"{arch.experts} experts.",
            hint="The published format has features that double up to a limit, such as "
            f"{regular}, one channel and five experts.",
        )
    resampling = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [160.0, 196.0, 160.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": base,
        "n_conv_per_stage_encoder": list(arch.encoder_convs),
        "n_conv_per_stage_decoder": list(arch.decoder_convs),
        "num_pool_per_axis": [arch.stages - 1] * 3,
        "pool_op_kernel_sizes": [[stride] * 3 for stride in arch.strides],
        "conv_kernel_sizes": [[3, 3, 3]] * arch.stages,
        "unet_max_num_features": most,
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resampling},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resampling},
        "batch_dice": False,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [160, 196, 160],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def _dataset() -> dict[str, Any]:
    return {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }
