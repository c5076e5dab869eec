"""Checkpoints to bundles: whole, by number, and without running anything that lies in them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from conftest import TINY, random_tensors
from mome_sdk import open_engine
from mome_sdk.errors import BundleError, InputError
from mome_sdk.export.checkpoint import _SAFE_GLOBALS, import_checkpoint
from mome_sdk.network import UNet

GOLDEN = Path(__file__).parents[1] / "golden"
TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"
SET = GOLDEN / "checkpoint" / "Dataset900_Synthetic" / TRAINER


@pytest.fixture
def trainer(tmp_path) -> Path:
    """A copy of the golden set to spoil: plans.json, dataset.json and fold_MoME."""
    return Path(shutil.copytree(SET, tmp_path / TRAINER))


@pytest.fixture
def fold(trainer) -> Path:
    return trainer / "fold_MoME"


def refused(folder: Path, code: str, which: str | None = None) -> str:
    """The message of the one clear line; nothing is written."""
    out = folder.parent / "out"
    with pytest.raises(BundleError) as caught:
        import_checkpoint(folder, out, which)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_SAFE_GLOBALS):
        return dict(torch.load(path, weights_only=True))


def alter(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the weights of a checkpoint."""
    content = load(path)
    change(content["network_weights"])
    torch.save(content, path)


def replan(trainer: Path, **changes: object) -> None:
    plans = json.loads((trainer / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    for key, value in changes.items():
        (configuration if key in configuration else plans)[key] = value
    (trainer / "plans.json").write_text(json.dumps(plans))


def test_set_becomes_a_bundle_that_says_where_it_comes_from(tmp_path):
    bundle = import_checkpoint(SET / "fold_MoME", tmp_path / "b")
    assert bundle.architecture.features == (8, 16, 24)
    assert bundle.patch == (16, 16, 24)
    assert bundle.modalities == ("T1", "T1ce", "T2", "FLAIR", "DWI")
    assert bundle.blend == "authors"
    assert bundle.manifest["mirror_axes"] == [0, 1, 2]
    training = bundle.manifest["training"]
    assert training["expert_order"] == "order by file number"
    assert len(training["files"]) == 6
    assert (training["epoch"], training["trainer"]) == (2, "nnUNetTrainer")


def test_every_weight_arrives_under_its_own_expert(tmp_path):
    bundle = import_checkpoint(SET, tmp_path / "b.zip")
    names = {"gate": "", **{f"experts.{i}": str(i + 1) for i in range(5)}}
    arrived = 0
    for prefix, number in names.items():
        state = load(SET / "fold_MoME" / f"checkpoint_best{number}.pth")["network_weights"]
        for key, tensor in state.items():
            if not key.startswith("decoder.encoder.") and ".all_modules." not in key:
                np.testing.assert_array_equal(bundle.tensors[f"{prefix}.{key}"], tensor)
                arrived += 1
    assert arrived == len(bundle.tensors) == 6 * 48


@pytest.mark.parametrize("levels", range(4))
def test_folder_may_be_named_from_above(levels, tmp_path):
    folder = (SET / "fold_MoME", *(SET / "fold_MoME").parents)[levels]
    assert import_checkpoint(folder, tmp_path / "b").patch == (16, 16, 24)


def test_best_comes_before_final_before_latest(fold, tmp_path):
    for path in fold.glob("*.pth"):
        for name in ("final", "latest"):
            shutil.copy(path, fold / path.name.replace("best", name))
    files = import_checkpoint(fold, tmp_path / "a").manifest["training"]["files"]
    assert "checkpoint_best.pth" in files
    files = import_checkpoint(fold, tmp_path / "b", "latest").manifest["training"]["files"]
    assert "checkpoint_latest.pth" in files
    for path in fold.glob("checkpoint_best*.pth"):
        path.unlink()
    files = import_checkpoint(fold, tmp_path / "c").manifest["training"]["files"]
    assert "checkpoint_final.pth" in files
    assert "checkpoint_best.pth" in refused(fold, "bundle.missing-file", "best")
    with pytest.raises(InputError) as caught:
        import_checkpoint(fold, tmp_path / "d", "newest")
    assert caught.value.code == "argument.set"


def test_files_of_numpy_1_are_read_too(fold, tmp_path):
    expected = import_checkpoint(fold, tmp_path / "a")
    shutil.copy(GOLDEN / "checkpoint" / "numpy1_names" / "checkpoint_best1.pth", fold)
    bundle = import_checkpoint(fold, tmp_path / "b")
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(bundle.tensors[name], tensor)


def test_plans_are_taken_from_the_checkpoint_where_no_file_is(trainer, fold, tmp_path):
    (trainer / "plans.json").unlink()
    (trainer / "dataset.json").unlink()
    assert import_checkpoint(fold, tmp_path / "b").patch == (16, 16, 24)


def test_full_size_plans_are_the_published_network():
    from mome_sdk.export.checkpoint import _architecture, _configuration

    plans = json.loads((GOLDEN / "plans_fullsize" / "plans.json").read_text())
    architecture = _architecture(_configuration(plans, "3d_fullres"), 2, 5)
    assert architecture.features == (32, 64, 128, 256, 320, 320)
    count = sum(np.prod(shape) for shape in architecture.tensor_shapes().values())
    assert count == 187_318_244


def test_plain_nnunet_fold_becomes_a_bundle_of_one_expert(fold, tmp_path):
    shutil.move(fold / "checkpoint_best4.pth", tmp_path / "expert.pth")
    for path in fold.iterdir():
        path.unlink()
    shutil.move(tmp_path / "expert.pth", fold / "checkpoint_final.pth")
    bundle = import_checkpoint(fold, tmp_path / "b")
    assert bundle.architecture.experts == 1
    assert bundle.modalities == ("MRI",)
    network = UNet(bundle.architecture, 1, 2)
    network.load_state_dict(
        {n.removeprefix("experts.0."): torch.tensor(t) for n, t in bundle.tensors.items()}
    )
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 24)).astype(np.float32)
    with torch.inference_mode():
        (expected,), _ = network(torch.from_numpy(image), levels=1)
    logits = np.empty((1, 2, 16, 16, 24), np.float32)
    open_engine(bundle, "onnxruntime", threads=1).run(image, logits)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_plans_of_later_nnunets_are_read_too(trainer, fold, tmp_path):
    plans = json.loads((trainer / "plans.json").read_text())
    old = plans["configurations"]["3d_fullres"]
    sizes = {
        "n_stages": 3,
        "features_per_stage": [8, 16, 24],
        "kernel_sizes": old["conv_kernel_sizes"],
        "strides": old["pool_op_kernel_sizes"],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    kept = ("spacing", "normalization_schemes", "use_mask_for_norm")
    plans["configurations"] = {
        "base": {key: old[key] for key in kept},
        "3d_fullres": {
            "inherits_from": "base",
            "patch_size": old["patch_size"],
            "architecture": {"network_class_name": name, "arch_kwargs": sizes},
        },
    }
    (trainer / "plans.json").write_text(json.dumps(plans))
    assert import_checkpoint(fold, tmp_path / "b").architecture.features == (8, 16, 24)


# ---- not one whole set


def test_no_folder_or_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "bundle.not-found")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "bundle.no-checkpoint")


@pytest.mark.parametrize("name", ["checkpoint_best.pth", "checkpoint_best3.pth"])
def test_missing_file_is_named(name, fold):
    (fold / name).unlink()
    assert name in refused(fold, "bundle.missing-file")


def test_seventh_file_is_refused(fold):
    shutil.copy(fold / "checkpoint_best5.pth", fold / "checkpoint_best6.pth")
    assert "checkpoint_best6.pth" in refused(fold, "bundle.unknown-file")


def test_two_folds_are_refused(trainer):
    shutil.copytree(trainer / "fold_MoME", trainer / "fold_0")
    assert "fold_0, fold_MoME" in refused(trainer, "bundle.ambiguous")


@pytest.mark.parametrize("copied", [["best3"], ["best", "best2", "best3", "best4", "best5"]])
def test_copies_of_one_network_are_refused(copied, fold):
    for name in copied:
        shutil.copy(fold / "checkpoint_best1.pth", fold / f"checkpoint_{name}.pth")
    assert "hold the same weights" in refused(fold, "bundle.identical-experts")


def test_same_weights_in_another_file_are_refused(fold):
    content = load(fold / "checkpoint_best1.pth")
    content["current_epoch"] = 7
    torch.save(content, fold / "checkpoint_best2.pth")
    refused(fold, "bundle.identical-experts")


# ---- what is in the files


class Hostile:
    """Would create a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_pickled_code_does_not_run(fold, tmp_path):
    target = tmp_path / "was-here"
    content = load(fold / "checkpoint_best2.pth")
    torch.save({**content, "logging": Hostile(target)}, fold / "checkpoint_best2.pth")
    assert "checkpoint_best2.pth" in refused(fold, "bundle.unsafe-pickle")
    assert not target.exists()
    # The file does what it is said to do wherever it is loaded without care.
    torch.load(fold / "checkpoint_best2.pth", weights_only=False)
    assert target.exists()


def test_bare_pickle_is_no_checkpoint(fold, tmp_path):
    target = tmp_path / "was-here"
    (fold / "checkpoint_best2.pth").write_bytes(pickle.dumps(Hostile(target)))
    refused(fold, "bundle.unreadable")
    assert not target.exists()


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.99])
def test_truncated_file_is_refused(left, fold):
    path = fold / "checkpoint_best.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if left < 1 else left])
    assert "checkpoint_best.pth" in refused(fold, "bundle.unreadable")


def test_zip_of_something_else_is_refused(fold):
    with zipfile.ZipFile(fold / "checkpoint_best.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(fold, "bundle.unreadable")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"network_weights": {"a": torch.zeros(1)}},
        {"network_weights": {"a": 1}, "init_args": {}},
        {"network_weights": {1: torch.zeros(1).to_sparse()}, "init_args": {}},
    ],
)
def test_other_contents_are_refused(content, fold):
    torch.save(content, fold / "checkpoint_best.pth")
    refused(fold, "bundle.checkpoint")


HEAD = "decoder.seg_layers.1.bias"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop(HEAD), f"experts.2.{HEAD}"),
        (lambda w: w.update({"extra.weight": torch.zeros(3)}), "experts.2.extra.weight"),
        (lambda w: w.update({HEAD: torch.zeros(3)}), r"(3,), (2,) is expected"),
        (lambda w: w.update({HEAD: torch.zeros(2).half()}), "float16"),
    ],
)
def test_missing_extra_or_misshaped_tensors_are_refused(change, text, fold):
    alter(fold / "checkpoint_best3.pth", change)
    assert text in refused(fold, "bundle.tensors")


def test_alias_that_differs_from_its_original_is_refused(fold):
    key = "decoder.encoder.stages.0.0.convs.0.conv.bias"
    alter(fold / "checkpoint_best3.pth", lambda w: w.update({key: w[key] + 1}))
    assert key in refused(fold, "bundle.alias")


def test_weights_that_are_not_finite_are_refused(fold):
    alter(fold / "checkpoint_best3.pth", lambda w: w[HEAD].fill_(float("nan")))
    assert HEAD in refused(fold, "bundle.not-finite")


# ---- plans


@pytest.mark.parametrize(
    "changes",
    [
        {"configurations": {}},
        {"UNet_class_name": "ResidualEncoderUNet"},
        {"conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]},
        {"pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]},
        {"pool_op_kernel_sizes": [[1, 1, 1], [4, 4, 4], [2, 2, 2]]},
        {"n_conv_per_stage_encoder": [2, 2]},
        {"n_conv_per_stage_decoder": None},
        {"UNet_base_num_features": "many"},
        {"patch_size": [16, 16]},
        {"spacing": [1.0, 1.0, 2.0]},
        {"normalization_schemes": ["CTNormalization"]},
        {"use_mask_for_norm": [True]},
        {"transpose_forward": [1, 0, 2]},
        {"image_reader_writer": "NaturalImage2DIO"},
    ],
)
def test_plans_for_another_package_are_refused(changes, trainer, fold):
    replan(trainer, **changes)
    refused(fold, "bundle.plans")


def test_plans_of_another_network_do_not_fit(trainer, fold):
    replan(trainer, UNet_base_num_features=16)
    refused(fold, "bundle.tensors")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_names", {"0": "T1", "1": "T2"}),
        ("labels", {"background": 0, "a": 1, "b": 1}),
        ("labels", {"background": 0, "tumour": [1, 2]}),
        ("labels", {"background": 0}),
        ("labels", None),
    ],
)
def test_data_set_for_another_package_is_refused(field, value, trainer, fold):
    content = json.loads((trainer / "dataset.json").read_text())
    (trainer / "dataset.json").write_text(json.dumps({**content, field: value}))
    refused(fold, "bundle.plans")


def test_description_that_is_no_json_is_refused(trainer, fold):
    for text in ("{", "[]"):
        (trainer / "plans.json").write_text(text)
        assert "plans.json" in refused(fold, "bundle.plans")


# ---- our own training


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as `mome train` leaves it."""
    folder = tmp_path / "run"
    (folder / "joint").mkdir(parents=True)
    save_file(random_tensors(TINY), folder / "joint" / "checkpoint.safetensors")
    record = {
        "name": "tiny",
        "architecture": {
            "features": TINY.features,
            "strides": TINY.strides,
            "encoder_convs": TINY.encoder_convs,
            "decoder_convs": TINY.decoder_convs,
            "in_channels": 1,
            "classes": 2,
            "experts": 5,
        },
        "patch": [16, 16, 16],
        "modalities": ["T1", "T1ce", "T2", "FLAIR", "DWI"],
        "training": {"seed": 1},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_run_of_our_own_becomes_a_bundle(run, tmp_path):
    bundle = import_checkpoint(run, tmp_path / "b")
    assert (bundle.name, bundle.blend) == ("tiny", "exact")
    assert bundle.manifest["training"] == {"seed": 1}
    for name, tensor in random_tensors(TINY).items():
        np.testing.assert_array_equal(bundle.tensors[name], tensor)
    assert open_engine(bundle, "onnxruntime").classes == 2


def test_run_that_is_not_finished_or_not_described_is_refused(run):
    (run / "run.json").write_text('{"name": "tiny"}')
    refused(run, "bundle.run")
    (run / "run.json").write_text("{")
    refused(run, "bundle.run")
    (run / "joint" / "checkpoint.safetensors").unlink()
    refused(run, "bundle.missing-file")


def test_output_that_exists_is_not_overwritten(run, tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError) as caught:
        import_checkpoint(run, tmp_path / "b")
    assert caught.value.code == "argument.output"
