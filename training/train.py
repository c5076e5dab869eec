"""Three stages: the experts, the gate, all networks jointly; each resumes where it stopped.

Experts, then all networks, is the published order. The gate stage between them is ours: it teaches
the gate which modality it looks at. The published gate learns from the fused loss alone, in 800
epochs; the few hundred steps of a demonstration are too few for that.

A run folder holds `experts/<modality>.safetensors`, `joint/gate.safetensors`, then
`joint/checkpoint.safetensors` and `run.json`; `mome import RUN -o BUNDLE` makes a bundle of it.
Patches are drawn from seeds (run, stage, step), so a resumed run sees the patches that an
uninterrupted one would have seen. Under torchrun the processes share every batch and step with the
mean of their gradients.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from mome_sdk.errors import BundleError, InputError
from mome_sdk.files import write_file
from mome_sdk.network import MoME, UNet

from .anatomy import Anatomy
from .config import LossConfig, StageConfig, TrainConfig
from .losses import (
    curriculum_loss,
    deep_supervision,
    level_weights,
    routing_loss,
    targets_at_levels,
)
from .patches import PatchSource, batch_of, load_anatomies, patch_source

CLIP_NORM = 12.0  # nnU-Net 2.2; the joint stage clips the gate only (published trainer)
JOINT_STREAM, GATE_STREAM = 100, 300  # of seeds; a round of an expert has 1 + index + 10 x round
POLY_POWER = 0.9
SAVE_EVERY = 50


class ExpertLoss(nn.Module):
    """One expert with its auxiliary tissue head; the head is thrown away after training."""

    def __init__(
        self, expert: UNet, features: int, weights: Sequence[float], loss: LossConfig
    ) -> None:
        super().__init__()
        self.expert = expert
        self.tissue_head = nn.Conv3d(features, 4, 1)
        self.loss = loss
        self.weights = weights
        self.last_features: Tensor | None = None
        expert.decoder.stages[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.last_features = output

    def forward(self, image: Tensor, lesion: Tensor, tissue: Tensor) -> Tensor:
        outputs, _ = self.expert(image, self.loss.levels)
        targets = targets_at_levels(lesion, self.loss.levels)
        loss = deep_supervision(outputs, targets, self.weights, smooth=self.loss.dice_smooth)
        if self.loss.tissue_weight > 0:
            assert self.last_features is not None
            tissue_loss = functional.cross_entropy(self.tissue_head(self.last_features), tissue)
            loss = loss + self.loss.tissue_weight * tissue_loss
        return loss


def train_expert(
    config: TrainConfig, modality: str, anatomies: Sequence[Anatomy], run: Path
) -> None:
    """Stage 1: one expert alone on its modality; writes `experts/<modality>.safetensors`.

    With a `warm_start` it has one round for each entry, of which all but the last leave
    `experts/<modality>-<number>.safetensors`, numbered from 1. The learning rate restarts.

    Raises:
        BundleError: `bundle.missing`, the expert to start from is not finished.
    """
    if _finished(run / "experts" / f"{modality}.safetensors"):
        return
    starts = config.warm_start.get(modality, ())
    names = [*(f"{modality}-{number}" for number in range(1, len(starts))), modality]
    stage = config.continued if starts else config.experts
    for number, name in enumerate(names):
        if _finished(run / "experts" / f"{name}.safetensors"):
            continue
        index = config.modalities.index(modality)
        torch.manual_seed(config.seed * 10 + index)
        arch = config.architecture
        expert = UNet(arch, arch.in_channels, arch.classes)
        if starts:
            start = names[number - 1] if number else starts[0]
            expert.load_state_dict(_load_expert(run, start))
        source = patch_source(config, stage, anatomies, [index], 1 + index + 10 * number)
        _train_alone(expert, source, config, stage, run / "experts" / name)


def _train_alone(
    expert: UNet, source: PatchSource, config: TrainConfig, stage: StageConfig, where: Path
) -> None:
    features = config.architecture.features[0]
    model = ExpertLoss(expert, features, _level_weights(config), config.loss)
    groups = [{"params": list(model.parameters()), "lr": stage.lr}]

    def loss_of(step: int) -> Tensor:
        images, lesions, tissues, _ = batch_of(source, step, _share(stage.batch))
        loss: Tensor = model(images, lesions, tissues)
        return loss

    _optimise(model, model, groups, stage, loss_of, where)
    _save_tensors(expert, where.with_suffix(".safetensors"))


def train_gate(config: TrainConfig, anatomies: Sequence[Anatomy], run: Path) -> None:
    """Stage 2, ours: the gate alone learns whose image it sees; writes `joint/gate.safetensors`.

    Its maps learn to be 1 for the expert of the image's modality and 0 for the others, everywhere
    (`routing_loss`). It starts from an expert's weights. The experts stay as they are, and only
    their first stages are computed, which is what makes a step cheap.

    Raises:
        BundleError: `bundle.missing`, an expert is not finished.
        InputError: `argument.config`, the configuration has no gate stage.
    """
    stage, where = config.gate, run / "joint" / "gate"
    if stage is None:
        raise InputError("argument.config", "The configuration has no [gate] to train.")
    if _finished(where.with_suffix(".safetensors")):
        return
    model = _with_experts(config, run)
    model.experts.requires_grad_(False)
    _start_from_expert(model, config.modalities.index(stage.start))
    groups = [{"params": list(model.gate.parameters()), "lr": stage.lr}]
    weights = _level_weights(config)
    source = patch_source(config, stage, anatomies, range(model.arch.experts), GATE_STREAM)

    def loss_of(step: int) -> Tensor:
        images, _, _, modalities = batch_of(source, step, _share(stage.batch))
        return routing_loss(model.gates(images, len(weights)), modalities.tolist(), weights)

    _optimise(model.gate, model.gate, groups, stage, loss_of, where)
    _save_tensors(model.gate, where.with_suffix(".safetensors"))


def train_joint(config: TrainConfig, anatomies: Sequence[Anatomy], run: Path) -> None:
    """Stage 3: all networks under the curriculum loss; writes `joint/checkpoint.safetensors`.

    In the first `warm_up` steps only the gate learns, from the fused loss; then the curriculum runs
    from the experts' own losses to the fused loss (paper, equation 2).

    Raises:
        BundleError: `bundle.missing`, an expert or the gate is not finished.
    """
    finished = run / "joint" / "checkpoint.safetensors"
    if _finished(finished):
        return
    stage = config.joint
    model = _with_experts(config, run)
    if config.gate is None:
        _start_as_average(model)
    else:
        gate = _load(run / "joint" / "gate.safetensors", "The gate", "gate stage")
        model.gate.load_state_dict(gate)
    groups = [
        {"params": list(model.experts.parameters()), "lr": stage.lr},
        {"params": list(model.gate.parameters()), "lr": stage.gate_lr},
    ]
    weights = _level_weights(config)
    source = patch_source(config, stage, anatomies, range(model.arch.experts), JOINT_STREAM)

    def loss_of(step: int) -> Tensor:
        frozen = step < stage.warm_up
        model.experts.requires_grad_(not frozen)
        progress = 1.0 if frozen else (step - stage.warm_up) / (stage.steps - stage.warm_up)
        images, lesions, _, modalities = batch_of(source, step, _share(stage.batch))
        return curriculum_loss(
            model(images, len(weights)),
            lesions,
            modalities.tolist(),
            weights,
            progress=progress,
            smooth=config.loss.dice_smooth,
            batch=stage.batch,
        )

    _optimise(model, model.gate, groups, stage, loss_of, run / "joint" / "train")
    if _rank() == 0:
        _write_record(config, run)
    _save_tensors(model, finished)


def _with_experts(config: TrainConfig, run: Path) -> MoME:
    """The network with its trained experts; the gate is random."""
    torch.manual_seed(config.seed)
    model = MoME(config.architecture)
    for expert, modality in zip(model.experts, config.modalities, strict=True):
        expert.load_state_dict(_load_expert(run, modality))
    return model


def _level_weights(config: TrainConfig) -> list[float]:
    """One for every level with a loss; the last is 0 where they are all levels, as published."""
    levels = config.loss.levels
    return level_weights(levels, drop_coarsest=levels == config.architecture.stages - 1)


def _start_from_expert(model: MoME, index: int) -> None:
    """The gate takes over an expert's weights, and starts as the average of all.

    Of its first convolution that is the image's part; the part that sees the experts' features
    keeps a tenth of its random weights.
    """
    gate = model.gate.state_dict()
    first, images = "encoder.stages.0.0.convs.0.conv.weight", model.arch.in_channels
    for name, weight in model.experts[index].state_dict().items():
        if gate[name].shape == weight.shape:
            gate[name].copy_(weight)
        elif name == first:
            gate[first][:, :images] = weight
            gate[first][:, images:] *= 0.1
    _start_as_average(model)


def _start_as_average(model: MoME) -> None:
    """Gate heads near zero with bias 1 / E: the fused output starts as the mean of the experts."""
    for head in model.gate.decoder.seg_layers:
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        nn.init.normal_(head.weight, std=0.02)
        nn.init.constant_(head.bias, 1.0 / model.arch.experts)


def _optimise(
    model: nn.Module,
    clipped: nn.Module,
    groups: list[dict[str, Any]],
    stage: StageConfig,
    loss_of: Callable[[int], Tensor],
    where: Path,
) -> None:
    """The loop: poly learning rate, clipped gradients, a log line and a state every so often."""
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = _optimizer(groups, stage)
    base = [group["lr"] for group in optimizer.param_groups]
    first = _resume(model, optimizer, where.with_suffix(".state.pt"))
    started, losses = time.monotonic(), []
    for step in range(first, stage.steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * (1 - step / stage.steps) ** POLY_POWER
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        losses.append(_average(model, loss.detach(), stage.batch))
        nn.utils.clip_grad_norm_(clipped.parameters(), CLIP_NORM)
        optimizer.step()
        if len(losses) == SAVE_EVERY or step + 1 == stage.steps:
            if _rank() == 0:
                seconds = (time.monotonic() - started) / len(losses)
                _log(where, step + 1, float(np.mean(losses)), seconds)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _save_state(where.with_suffix(".state.pt"), {**state, "step": step + 1})
            started, losses = time.monotonic(), []


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _share(batch: int) -> range:
    """The patches of a batch that are this process's."""
    return range(_rank(), batch, _processes())


def _average(model: nn.Module, loss: Tensor, batch: int) -> float:
    """The loss of the whole batch; its gradients take the place of those of this process's share.

    Both are the mean over processes, each weighted with its share of the batch. Every process has
    gradients for the same parameters: which ones, depends on the step alone.
    """
    if _processes() == 1:
        return float(loss)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    flat *= len(_share(batch)) / batch
    dist.all_reduce(flat)
    parts = flat[1:].split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return float(flat[0])


def _optimizer(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=stage.lr, momentum=0.99, nesterov=True, weight_decay=stage.weight_decay
        )
    return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=stage.weight_decay)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save_state(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _save_tensors(model: nn.Module, path: Path) -> None:
    if _rank() == 0:
        tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        write_file(path, save(tensors))
    _meet()  # the next stage of every process reads the file


def _finished(path: Path) -> bool:
    """Whether the file is there, with the same answer in all processes."""
    there = path.exists()
    _meet()  # none writes it before all have looked
    return there


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _load_expert(run: Path, name: str) -> dict[str, Tensor]:
    path = run / "experts" / f"{name}.safetensors"
    return _load(path, f"Expert {name}", f"experts stage for {name}")


def _load(path: Path, what: str, stage: str) -> dict[str, Tensor]:
    if not path.exists():
        raise BundleError(
            "bundle.missing",
            f"{what} is not trained yet: {path} does not exist.",
            hint=f"Run the {stage} first.",
        )
    return load_file(path)


def _log(where: Path, step: int, loss: float, seconds: float) -> None:
    with where.with_suffix(".csv").open("a", newline="") as file:
        csv.writer(file).writerow([step, f"{loss:.5f}", f"{seconds:.3f}"])
    print(f"{where.name}: step {step}, loss {loss:.4f}, {seconds:.2f} s a step", file=sys.stderr)


def _write_record(config: TrainConfig, run: Path) -> None:
    record = {
        "name": config.name,
        "architecture": dataclasses.asdict(config.architecture),
        "patch": config.patch,
        "modalities": config.modalities,
        "licence": config.licence,
        "notice": config.notice,
        "training": {
            "data": "synthetic lesions painted into anatomical label maps",
            "seed": config.seed,
            "train": config.data.train,
            "held_out": config.data.held_out,
            "expert_order": "order by training configuration",
            "expert_steps": config.experts.steps,
            "continued_steps": config.continued.steps,
            "warm_start": config.warm_start,
            "gate_steps": config.gate.steps if config.gate else 0,
            "joint_steps": config.joint.steps,
            "torch": torch.__version__.split("+")[0],
        },
    }
    write_file(run / "run.json", (json.dumps(record, indent=1) + "\n").encode())


def train(
    config: TrainConfig, labelmaps: Path, run: Path, *, stage: str, experts: Iterable[str]
) -> None:
    """Run a stage ("experts", "gate", "joint" or "all") into a run folder.

    Args:
        config: Of the run.
        labelmaps: Folder of the label maps that `config.data` names.
        run: Folder of the results; what is finished in it is not trained again.
        stage: Which part.
        experts: The modalities that the experts stage trains, in this order; two processes may
            share a run folder if they train different experts.

    Raises:
        BundleError: `bundle.missing`, an expert or a gate that is needed is not finished.
        InputError: `argument.config`, a batch has fewer patches than torchrun started processes, or
            there is no gate stage to run.
    """
    for folder in ("experts", "joint"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    anatomies = load_anatomies(config, labelmaps)
    with _process_group(config):
        if stage in ("experts", "all"):
            for modality in experts:
                train_expert(config, modality, anatomies, run)
        if stage == "gate" or (stage == "all" and config.gate):
            train_gate(config, anatomies, run)
        if stage in ("joint", "all"):
            train_joint(config, anatomies, run)


@contextmanager
def _process_group(config: TrainConfig) -> Iterator[None]:
    """Connect the processes that torchrun started; without torchrun there is nothing to do."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("gloo")
    try:
        for stage in (config.experts, config.continued, config.gate, config.joint):
            if stage is not None and stage.batch < _processes():
                raise InputError(
                    "argument.config",
                    f"A batch of {stage.batch} cannot be shared by {_processes()} processes.",
                    hint="Start as many as the smallest batch of the configuration, or fewer.",
                )
        yield
    finally:
        dist.destroy_process_group()
