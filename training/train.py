"""Stage 1 trains the experts, stage 2 all networks jointly; both resume where they stopped.

A run folder holds `experts/<modality>.safetensors`, then `joint/checkpoint.safetensors` and
`run.json`; `mome import RUN -o BUNDLE` makes a bundle of it. Patches are drawn from seeds (run,
stage, step), so a resumed run sees the patches that an uninterrupted one would have seen. Under
torchrun the processes share every batch and step with the mean of their gradients.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from mome_sdk.errors import BundleError, InputError
from mome_sdk.files import write_file
from mome_sdk.network import MoME, UNet

from .anatomy import Anatomy, load_anatomy
from .config import Index3, LossConfig, StageConfig, TrainConfig
from .losses import curriculum_loss, deep_supervision, level_weights, targets_at_levels
from .synth import synthesise

CLIP_NORM = 12.0  # nnU-Net 2.2; the joint stage clips the gate only (published trainer)
POLY_POWER = 0.9
REPEAT_AFTER = 8  # every patch is used twice, the second time mirrored, this many steps later
SAVE_EVERY = 50


class Patch(NamedTuple):
    """image (1, D, H, W); lesion and tissue (D, H, W); modality: expert index."""

    image: Tensor
    lesion: Tensor
    tissue: Tensor
    modality: int


PatchSource = Callable[[int, int], Patch]


def load_anatomies(config: TrainConfig, folder: Path, *, held_out: bool = False) -> list[Anatomy]:
    """The label maps that train, or the held-out ones, from a folder of `<stem>.nii.gz`."""
    stems = config.data.held_out if held_out else config.data.train
    return [load_anatomy(folder / f"{stem}.nii.gz") for stem in stems]


def patch_source(
    config: TrainConfig,
    stage: StageConfig,
    anatomies: Sequence[Anatomy],
    modalities: Sequence[int],
    stream: int,
) -> PatchSource:
    """(step, number in the batch) -> patch, a function of the seeds alone.

    The modalities take turns. Each patch comes twice, the second time mirrored. `stream` tells the
    stages' seeds apart.
    """

    @lru_cache(maxsize=(REPEAT_AFTER + 1) * stage.batch)
    def draw(step: int, number: int) -> Patch:
        rng = np.random.default_rng([config.seed, stream, step, number])
        modality = modalities[(step * stage.batch + number) % len(modalities)]
        anatomy = anatomies[int(rng.integers(len(anatomies)))]
        small = step < stage.small_steps
        shape = stage.small_patch if small else config.patch
        start = _box(anatomy, shape, rng, in_head=small)
        name = config.modalities[modality]
        sample = synthesise(anatomy, start, shape, name, config.synthesis, rng)
        image, lesion, tissue = map(torch.from_numpy, (sample.image, sample.lesion, sample.tissue))
        return Patch(image[None], lesion, tissue, modality)

    def patch(step: int, number: int) -> Patch:
        if (step // REPEAT_AFTER) % 2 == 0:
            return draw(step, number)
        first = draw(step - REPEAT_AFTER, number)
        image, lesion, tissue = (volume.flip(-1) for volume in first[:3])  # left-right
        return Patch(image, lesion, tissue, first.modality)

    return patch


def _box(anatomy: Anatomy, shape: Index3, rng: np.random.Generator, *, in_head: bool) -> Index3:
    """First voxel of a random box; `in_head` asks for its centre to be in the head."""
    grid = anatomy.tissue.shape
    while True:
        z, y, x = (int(rng.integers(0, g - s + 1)) for g, s in zip(grid, shape, strict=True))
        if not in_head or anatomy.tissue[z + shape[0] // 2, y + shape[1] // 2, x + shape[2] // 2]:
            return z, y, x


def batch_of(source: PatchSource, step: int, batch: int) -> tuple[Tensor, ...]:
    """Images (B, 1, D, H, W), lesions, tissues (B, D, H, W), modalities (B,) of one step.

    B is `batch`, or this process's share of it.
    """
    patches = [source(step, number) for number in range(_rank(), batch, _processes())]
    images = torch.stack([p.image for p in patches]).contiguous(
        memory_format=torch.channels_last_3d
    )
    lesions = torch.stack([p.lesion for p in patches])
    tissues = torch.stack([p.tissue for p in patches]).long()
    return images, lesions, tissues, torch.tensor([p.modality for p in patches])


class ExpertLoss(nn.Module):
    """One expert with its auxiliary tissue head; the head is thrown away after training."""

    def __init__(self, expert: UNet, features: int, levels: int, loss: LossConfig) -> None:
        super().__init__()
        self.expert = expert
        self.tissue_head = nn.Conv3d(features, 4, 1)
        self.loss = loss
        self.weights = level_weights(loss.levels, drop_coarsest=loss.levels == levels)
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

    Raises:
        BundleError: `bundle.missing`, the expert to start from (`warm_start`) is not finished.
    """
    finished = run / "experts" / f"{modality}.safetensors"
    if finished.exists():
        return
    index = config.modalities.index(modality)
    torch.manual_seed(config.seed * 10 + index)
    arch = config.architecture
    expert = UNet(arch, arch.in_channels, arch.classes)
    stage = config.experts
    if modality in config.warm_start:
        expert.load_state_dict(_load_expert(run, config.warm_start[modality]))
        stage = config.continued
    model = ExpertLoss(expert, arch.features[0], arch.stages - 1, config.loss)
    groups = [{"params": list(model.parameters()), "lr": stage.lr}]
    source = patch_source(config, stage, anatomies, [index], 1 + index)

    def loss_of(step: int) -> Tensor:
        images, lesions, tissues, _ = batch_of(source, step, stage.batch)
        loss: Tensor = model(images, lesions, tissues)
        return loss

    _optimise(model, model, groups, stage, loss_of, run / "experts" / modality)
    _save_tensors(expert, finished)


def train_joint(config: TrainConfig, anatomies: Sequence[Anatomy], run: Path) -> None:
    """Stage 2: all networks under the curriculum loss; writes `joint/checkpoint.safetensors`.

    In the first `warm_up` steps only the gate learns, from the fused loss; then the curriculum runs
    from the experts' own losses to the fused loss (paper, equation 2).

    Raises:
        BundleError: `bundle.missing`, an expert is not finished.
    """
    finished = run / "joint" / "checkpoint.safetensors"
    if finished.exists():
        return
    torch.manual_seed(config.seed)
    arch, stage = config.architecture, config.joint
    model = MoME(arch)
    for expert, modality in zip(model.experts, config.modalities, strict=True):
        expert.load_state_dict(_load_expert(run, modality))
    _start_as_average(model)
    groups = [
        {"params": list(model.experts.parameters()), "lr": stage.lr},
        {"params": list(model.gate.parameters()), "lr": stage.gate_lr},
    ]
    weights = level_weights(config.loss.levels, drop_coarsest=config.loss.levels == arch.stages - 1)
    source = patch_source(config, stage, anatomies, range(arch.experts), 100)

    def loss_of(step: int) -> Tensor:
        frozen = step < stage.warm_up
        model.experts.requires_grad_(not frozen)
        progress = 1.0 if frozen else (step - stage.warm_up) / (stage.steps - stage.warm_up)
        images, lesions, _, modalities = batch_of(source, step, stage.batch)
        return curriculum_loss(
            model(images, config.loss.levels),
            lesions,
            modalities.tolist(),
            weights,
            progress=progress,
            smooth=config.loss.dice_smooth,
            processes=_processes(),
        )

    _optimise(model, model.gate, groups, stage, loss_of, run / "joint" / "train")
    if _rank() == 0:
        _write_record(config, run)
    _save_tensors(model, finished)


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
        losses.append(_average(model, loss.detach()))
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


def _average(model: nn.Module, loss: Tensor) -> float:
    """The mean loss of all processes; the mean of their gradients takes the place of each one's.

    Every process has gradients for the same parameters: which ones, depends on the step alone.
    """
    if _processes() == 1:
        return float(loss)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    flat /= _processes()
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
    if dist.is_initialized():
        dist.barrier()  # the next stage of every process reads the file


def _load_expert(run: Path, modality: str) -> dict[str, Tensor]:
    path = run / "experts" / f"{modality}.safetensors"
    if not path.exists():
        raise BundleError(
            "bundle.missing",
            f"Expert {modality} is not trained yet: {path} does not exist.",
            hint=f"Run the experts stage for {modality} first.",
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
            "joint_steps": config.joint.steps,
            "torch": torch.__version__.split("+")[0],
        },
    }
    write_file(run / "run.json", (json.dumps(record, indent=1) + "\n").encode())


def train(
    config: TrainConfig, labelmaps: Path, run: Path, *, stage: str, experts: Iterable[str]
) -> None:
    """Run a stage ("experts", "joint" or "all") into a run folder.

    Args:
        config: Of the run.
        labelmaps: Folder of the label maps that `config.data` names.
        run: Folder of the results; what is finished in it is not trained again.
        stage: Which part.
        experts: The modalities that the experts stage trains, in this order; two processes may
            share a run folder if they train different experts.

    Raises:
        BundleError: `bundle.missing`, an expert that is needed is not finished.
        InputError: `argument.config`, the processes of torchrun cannot share a batch evenly.
    """
    for folder in ("experts", "joint"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    anatomies = load_anatomies(config, labelmaps)
    with _process_group(config):
        if stage in ("experts", "all"):
            for modality in experts:
                train_expert(config, modality, anatomies, run)
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
        for stage in (config.experts, config.continued, config.joint):
            if stage.batch % _processes():
                raise InputError(
                    "argument.config",
                    f"A batch of {stage.batch} cannot be shared by {_processes()} processes.",
                    hint="Every batch of the configuration must be a multiple of their number.",
                )
        yield
    finally:
        dist.destroy_process_group()
