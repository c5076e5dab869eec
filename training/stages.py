"""The stages of a MoME: the experts, the gate, all networks jointly.

Experts, then all networks, is the published order. The gate stage between them is ours: the gate
alone learns, from the fused loss, while the experts stay as they are. That is cheap, because the
experts' outputs on a patch do not change; the published gate has 800 epochs of the joint stage.

A run folder holds `experts/<modality>.safetensors`, `joint/gate.safetensors`, then
`joint/checkpoint.safetensors` and `run.json`; `mome import RUN -o BUNDLE` makes a bundle of it.
Beside them lie what each stage needs to go on, its log as CSV, and TensorBoard's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import InputError
from mome_sdk.files import write_file
from mome_sdk.network import MoME

from .batch import PatchSource
from .config import NOTHING, JointConfig, StageConfig, TrainConfig
from .dataset import Scan, as_it_is, build_cache, check_splits, read_table, registered
from .mome import (
    Expert,
    Gate,
    Mome,
    random_heads,
    start_as_average,
    start_from_expert,
    with_experts_logits,
)
from .patches import load_anatomies, patch_source
from .sampling import SamplingOptions, scan_source
from .train import Groups, finished, first_process, fit, load_weights, process_group, save_weights

JOINT_STREAM, GATE_STREAM = 100, 300  # of seeds; a round of an expert has 1 + index + 10 x round
VALIDATION = 1000  # added to a stream for its validation patches


class Sources(NamedTuple):
    """Patches that train, and those of the pseudo-Dice where there are any."""

    training: PatchSource
    validation: PatchSource | None


SourcesOf = Callable[[StageConfig, Sequence[int], int], Sources]
"""(stage, indices of the modalities, stream of seeds) -> patches."""


def painted_sources(config: TrainConfig, labelmaps: Path) -> SourcesOf:
    """Patches of images that are painted into the label maps of a folder as they are needed."""
    anatomies = load_anatomies(config, labelmaps)

    def sources(stage: StageConfig, modalities: Sequence[int], stream: int) -> Sources:
        training = patch_source(config, stage, anatomies, modalities, stream)
        if not stage.validation:
            return Sources(training, None)
        whole = dataclasses.replace(stage, small_patch=None, small_epochs=0)
        held = patch_source(config, whole, anatomies, modalities, stream + VALIDATION)
        return Sources(training, held)

    return sources


def table_sources(
    config: TrainConfig, scans: Sequence[Scan], cache: Path, seed: int | None = None
) -> SourcesOf:
    """Patches of the cases of a table, out of their cache."""

    def sources(stage: StageConfig, modalities: Sequence[int], stream: int) -> Sources:
        names = {config.modalities[index] for index in modalities}
        options = SamplingOptions(
            patch=stage.patch or config.patch,
            batch=stage.batch,
            seed=config.seed if seed is None else seed,
            stream=stream,
            weighting=stage.weighting,
            augment=stage.augment == "nnunet",
        )
        held = dataclasses.replace(
            options, stream=stream + VALIDATION, weighting="uniform", augment=False
        )

        def of(split: str) -> list[Scan]:
            return [scan for scan in scans if scan.split == split and scan.modality in names]

        training = scan_source(cache, of("train"), options)
        return Sources(training, scan_source(cache, of("val"), held) if stage.validation else None)

    return sources


def train_expert(config: TrainConfig, modality: str, sources: SourcesOf, run: Path) -> None:
    """Stage 1: one expert alone on its modality; writes `experts/<modality>.safetensors`.

    With a `warm_start` it has one round for each entry, of which all but the last leave
    `experts/<modality>-<number>.safetensors`, numbered from 1. The learning rate restarts.

    Raises:
        BundleError: `bundle.missing`, the expert to start from is not finished.
    """
    folder = run / "experts"
    if finished(folder / f"{modality}.safetensors"):
        return
    starts = config.warm_start.get(modality, (NOTHING,))
    names = [*(f"{modality}-{number}" for number in range(1, len(starts))), modality]
    index = config.modalities.index(modality)
    for number, (name, start) in enumerate(zip(names, starts, strict=True)):
        if finished(folder / f"{name}.safetensors"):
            continue
        torch.manual_seed(config.seed * 10 + index)
        system = Expert(config.architecture, config.loss)
        stage = config.experts
        if start != NOTHING:
            assert config.continued is not None
            stage = config.continued
            system.expert.load_state_dict(_expert(run, names[number - 1] if number else start))
        training, validation = sources(stage, [index], 1 + index + 10 * number)
        fit(system, stage, training, folder / name, validation=validation)
        save_weights(system.expert.state_dict(), folder / name)


def train_gate(config: TrainConfig, sources: SourcesOf, run: Path) -> None:
    """Stage 2, ours: the gate alone learns; writes `joint/gate.safetensors`.

    Raises:
        BundleError: `bundle.missing`, an expert is not finished.
        InputError: `argument.config`, the configuration has no gate stage.
    """
    stage, where = config.gate, run / "joint" / "gate"
    if stage is None:
        raise InputError("argument.config", "The configuration has no [gate] to train.")
    if finished(where.with_suffix(".safetensors")):
        return
    model = with_experts(config, config.joint, run)
    start_from_expert(model, config.modalities.index(stage.start))
    system = Gate(model, config.loss)
    training, validation = sources(stage, range(model.arch.experts), GATE_STREAM)
    training = with_experts_logits(training, model, stage.distinct)
    groups = Groups([{"params": list(model.gate.parameters()), "lr": stage.lr}], model.gate)
    fit(system, stage, training, where, groups=groups, validation=validation)
    save_weights(model.gate.state_dict(), where)


def train_joint(config: TrainConfig, sources: SourcesOf, run: Path) -> None:
    """Stage 3: all networks under the curriculum loss; writes `joint/checkpoint.safetensors`.

    Raises:
        BundleError: `bundle.missing`, an expert or the gate is not finished.
    """
    where = run / "joint" / "checkpoint"
    if finished(where.with_suffix(".safetensors")):
        return
    model = with_experts(config, config.joint, run)
    if config.gate is not None:
        model.gate.load_state_dict(load_weights(run / "joint" / "gate", "The gate"))
    fit_joint(config, config.joint, model, sources, run / "joint" / "train")
    first_process(lambda: write_record(config, run))
    save_weights(model.state_dict(), where)


def fit_joint(
    config: TrainConfig, stage: JointConfig, model: MoME, sources: SourcesOf, where: Path
) -> None:
    """Train all networks of a model; of the gradients only the gate's are clipped, as published."""
    system = Mome(model, config.modalities, config.loss, stage)
    groups = [
        {"params": list(model.experts.parameters()), "lr": stage.lr},
        {"params": list(model.gate.parameters()), "lr": stage.gate_lr},
    ]
    training, validation = sources(stage, range(model.arch.experts), JOINT_STREAM)
    fit(system, stage, training, where, groups=Groups(groups, model.gate), validation=validation)


def with_experts(config: TrainConfig, stage: JointConfig, run: Path) -> MoME:
    """The network as its joint stage starts; a trained gate is not loaded."""
    torch.manual_seed(config.seed)
    model, fresh = MoME(config.architecture), MoME(config.architecture)
    if stage.experts == "trained":
        for expert, modality in zip(model.experts, config.modalities, strict=True):
            expert.load_state_dict(_expert(run, modality))
        if stage.heads == "random":
            random_heads(model, fresh)
    if stage.gate_start == "average":
        start_as_average(model)
    return model


def _expert(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_weights(run / "experts" / name, f"Expert {name}")


def write_record(config: TrainConfig, run: Path) -> None:
    """Write run.json: what `mome import` needs, and every number of the configuration."""
    record = {
        "name": config.name,
        "architecture": dataclasses.asdict(config.architecture),
        "patch": config.patch,
        "modalities": config.modalities,
        "licence": config.licence,
        "notice": config.notice,
        "training": {
            "source": "cases of a table"
            if config.table
            else "synthetic lesions painted into anatomical label maps",
            "seed": config.seed,
            "expert_order": "order by training configuration",
            "torch": torch.__version__.split("+")[0],
            **{
                name: _plain(value)
                for name in ("data", "table", "experts", "continued", "warm_start", "gate", "joint")
                if (value := getattr(config, name))
            },
        },
    }
    write_file(run / "run.json", (json.dumps(record, indent=1) + "\n").encode())


def _plain(value: Any) -> Any:
    return value if isinstance(value, Mapping) else dataclasses.asdict(value)


def train(
    config: TrainConfig, data: Path, run: Path, *, stage: str, experts: Iterable[str]
) -> None:
    """Run a stage ("experts", "gate", "joint" or "all") into a run folder.

    Args:
        config: Of the run.
        data: Folder of the label maps, or of the case table.
        run: Folder of the results; what is finished in it is not trained again.
        stage: Which part.
        experts: The modalities that the experts stage trains, in this order; two processes may
            share a run folder if they train different experts.

    Raises:
        BundleError: `bundle.missing`, an expert or a gate that is needed is not finished.
        InputError: `data.*`, a row of the case table cannot be used; `argument.config`, a batch has
            fewer patches than torchrun started processes, or there is no gate stage to run.
    """
    for folder in ("experts", "joint"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    with process_group():
        sources = _sources(config, data, run)
        if stage in ("experts", "all"):
            for modality in experts:
                train_expert(config, modality, sources, run)
        if stage == "gate" or (stage == "all" and config.gate):
            train_gate(config, sources, run)
        if stage in ("joint", "all"):
            train_joint(config, sources, run)


def _sources(config: TrainConfig, data: Path, run: Path) -> SourcesOf:
    if config.table is None:
        return painted_sources(config, data)
    scans = read_table(data / config.table.path)
    stages = (config.experts, config.continued, config.gate, config.joint)
    validation = any(stage is not None and stage.validation for stage in stages)
    check_splits(scans, config.modalities, validation=validation)
    space = config.table.space
    prepared = registered(ModelBundle.load("demo")) if space == "native" else as_it_is
    cache = run / "cache"
    first_process(lambda: build_cache(scans, cache, prepared=prepared, label=space))
    return table_sources(config, scans, cache)
