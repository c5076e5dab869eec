"""The one loop that trains every system here, and resumes at any kill to the same loss curve.

A run of the loop keeps two files beside each other: `<name>.latest.safetensors`, everything that is
needed to go on (weights, optimiser, epoch, log), replaced after every epoch, and `<name>.csv`, the
log. With validation there is `<name>.best.safetensors` too, the weights of the best epoch. Patches
are a function of seeds and step alone, so a resumed run sees what an uninterrupted one would have
seen. Under torchrun the processes share every batch and step with the mean of their gradients.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mome_sdk.errors import BundleError, EngineError, InputError
from mome_sdk.files import write_file
from mome_sdk.sliding_window import SlidingWindow

from .batch import Batch, Patch, PatchSource, batch_of
from .config import StageConfig
from .system import System

CLIP_NORM = 12.0  # nnU-Net 2.2; the joint stage clips the gate only (published trainer)
POLY_POWER = 0.9
EMA_DECAY = 0.9  # of the pseudo-Dice: nnU-Net 2.2
COLUMNS = (
    "epoch",
    "lr",
    "loss",
    "pseudo_dice",
    "ema_pseudo_dice",
    "peak_mb",
    "core_seconds",
    "seconds",
)


class Groups(NamedTuple):
    """parameters: optimiser groups with an lr each; clipped: whose gradient norm is limited."""

    parameters: Sequence[dict[str, Any]]
    clipped: nn.Module


@dataclass
class _State:
    """Where a run is; everything but tensors goes through JSON."""

    epoch: int = 0
    ema: float | None = None
    best: float | None = None
    log: list[list[float | None]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def fit(
    system: System,
    stage: StageConfig,
    source: PatchSource,
    where: Path,
    *,
    groups: Groups | None = None,
    validation: PatchSource | None = None,
) -> None:
    """Train a system to the end of its schedule; go on where an earlier call was interrupted.

    Args:
        system: Its network has the stage's result when this returns.
        stage: The schedule.
        source: (step, number in the batch) -> patch.
        where: Path of the run's files without suffix.
        groups: All parameters with the stage's learning rate, and all clipped, if not given.
        validation: Patches for the pseudo-Dice, if the stage has validation batches.

    Raises:
        InputError: `argument.config`, a batch cannot be shared by the processes of torchrun, or the
            precision is not there on this device.
        EngineError: `engine.diverged`, the loss is not a number any more.
    """
    network, device = system.network, _device()
    network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    groups = groups or Groups([{"params": list(network.parameters()), "lr": stage.lr}], network)
    optimizer, base = _optimizer(groups, stage), [group["lr"] for group in groups.parameters]
    scaler = torch.amp.GradScaler(device.type, enabled=stage.amp == "fp16")
    average = _Average(network, stage.average)
    _check(stage, device)
    state = _resume(network, optimizer, average, where)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    with _board(where, state) as board, _bar(where, stage, state) as bar:
        for epoch in range(state.epoch, stage.epochs):
            rate = (1 - epoch / stage.epochs) ** POLY_POWER
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * rate
            started, cores, losses = time.monotonic(), time.process_time(), []
            for step in range(epoch * stage.iterations, (epoch + 1) * stage.iterations):
                batch = _to(batch_of(source, step, _share(stage.batch)), device)
                optimizer.zero_grad(set_to_none=True)
                torch.manual_seed(step * processes() + _rank())  # for a loss that draws
                with _autocast(stage, device):
                    loss = system.loss(batch, epoch / stage.epochs)
                scaler.scale(loss).backward()
                losses.append(_share_gradients(network, loss.detach(), stage.batch))
                _check_finite(losses[-1], where, step)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(groups.clipped.parameters(), CLIP_NORM)
                scaler.step(optimizer)
                scaler.update()
                average.add(network)
                bar.update()
            score = _pseudo_dice(system, stage, validation, epoch) if validation else None
            state.ema = _smoothed(state.ema, score)
            mean = float(np.mean(losses))
            spent = (time.process_time() - cores, time.monotonic() - started)
            row = [epoch, stage.lr * rate, mean, score, state.ema, _peak_mb(device), *spent]
            state.log.append(row)
            state.epoch, state.scaler = epoch + 1, scaler.state_dict()
            if score is not None and (state.best is None or (state.ema or 0.0) > state.best):
                state.best = state.ema
                save_weights(average.weights(network), where.with_name(f"{where.name}.best"))
            _save_state(network, optimizer, average, state, where)
            _report(where, state, board, bar)
    if stage.checkpoint == "best":
        network.load_state_dict(load_weights(where.with_name(f"{where.name}.best"), "The best"))
    else:
        network.load_state_dict(average.weights(network))
    network.to("cpu")


def pseudo_dice(found: Sequence[NDArray[Any]], truth: Sequence[NDArray[Any]]) -> float | None:
    """2 TP / (2 TP + FP + FN) of all patches together; None if there is no voxel of either.

    nnU-Net's running measure: of patches that prefer the foreground, so above the Dice of images.
    """
    pairs = [(f != 0, t != 0) for f, t in zip(found, truth, strict=True)]
    both = sum(int((f & t).sum()) for f, t in pairs)
    total = sum(int(f.sum()) + int(t.sum()) for f, t in pairs)
    return 2 * both / total if total else None


def _pseudo_dice(
    system: System, stage: StageConfig, source: PatchSource, epoch: int
) -> float | None:
    first, found, truth = epoch * stage.validation, [], []
    for step in range(first, first + stage.validation):
        for number in range(stage.batch):
            patch = source(step, number)
            found.append(segment_patch(system, patch))
            truth.append(patch.lesion.numpy())
    return pseudo_dice(found, truth)


def segment_patch(system: System, patch: Patch) -> NDArray[np.uint8]:
    """The mask (D, H, W) of a patch, as one window."""
    depth, height, width = patch.lesion.shape
    window = SlidingWindow((depth, height, width), threads=1)
    image, lesion = patch.image.numpy(), patch.lesion.numpy()
    return system.segment(np.ascontiguousarray(image), patch.origin, window, lesion)


def _smoothed(ema: float | None, score: float | None) -> float | None:
    if score is None or ema is None:
        return ema if score is None else score
    return EMA_DECAY * ema + (1 - EMA_DECAY) * score


# ---- one step


def _device() -> torch.device:
    """The GPU of this process where there is one: torchrun gives each its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _rank() % torch.cuda.device_count())


def _peak_mb(device: torch.device) -> float:
    """The largest memory so far: the device's, or without one that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _to(batch: Batch, device: torch.device) -> Batch:
    def moved(part: Any) -> Any:
        return part.to(device) if isinstance(part, Tensor) else part

    return Batch(*map(moved, batch))


def _autocast(stage: StageConfig, device: torch.device) -> Any:
    if stage.amp == "off":
        return nullcontext()
    dtype = torch.bfloat16 if stage.amp == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def _check(stage: StageConfig, device: torch.device) -> None:
    if stage.batch < processes():
        raise InputError(
            "argument.config",
            f"A batch of {stage.batch} cannot be shared by {processes()} processes.",
            hint="Start as many as the smallest batch of the configuration, or fewer.",
        )
    if stage.amp == "fp16" and device.type != "cuda":
        raise InputError(
            "argument.config",
            "Training in fp16 needs a CUDA device, and there is none.",
            hint='Set amp = "off" or "bf16" in the configuration.',
        )


def _check_finite(loss: float, where: Path, step: int) -> None:
    if not np.isfinite(loss):
        raise EngineError(
            "engine.diverged",
            f"The loss of {where.name} is {loss} at step {step}.",
            hint='Lower the learning rate, or set amp = "off"; the last whole epoch is kept.',
        )


def _optimizer(groups: Groups, stage: StageConfig) -> torch.optim.Optimizer:
    parameters = list(groups.parameters)
    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=stage.lr, momentum=0.99, nesterov=True, weight_decay=stage.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=stage.weight_decay)


class _Average:
    """A running mean of the weights; of no effect with a decay of 0."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.mean = {k: v.clone() for k, v in network.state_dict().items()} if decay else {}

    @torch.no_grad()
    def add(self, network: nn.Module) -> None:
        for name, value in network.state_dict().items() if self.decay else ():
            self.mean[name].lerp_(value, 1 - self.decay)

    def weights(self, network: nn.Module) -> Mapping[str, Tensor]:
        return self.mean if self.decay else network.state_dict()


# ---- processes


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _share(batch: int) -> range:
    """The patches of a batch that are this process's."""
    return range(_rank(), batch, processes())


def _share_gradients(network: nn.Module, loss: Tensor, batch: int) -> float:
    """The loss of the whole batch; its gradients take the place of those of this process's share.

    Both are the mean over processes, each weighted with its share of the batch. Every process has
    gradients for the same parameters: which ones, depends on the step alone.
    """
    if processes() == 1:
        return float(loss)
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    flat *= len(_share(batch)) / batch
    dist.all_reduce(flat)
    parts = flat[1:].split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return float(flat[0])


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started; without torchrun there is nothing to do."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_process(write: Callable[[], None]) -> None:
    """Write a file in one process; all go on when it is there."""
    if _rank() == 0:
        write()
    _meet()


def finished(path: Path) -> bool:
    """Whether a file is there, with the same answer in all processes."""
    there = path.exists()
    _meet()  # none writes it before all have looked
    return there


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---- files


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write `<path>.safetensors`, whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    first_process(lambda: write_file(Path(f"{path}.safetensors"), save(tensors)))


def load_weights(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of `<path>.safetensors`.

    Raises:
        BundleError: `bundle.missing`, `what` is not trained yet.
    """
    file = Path(f"{path}.safetensors")
    if not file.exists():
        raise BundleError(
            "bundle.missing",
            f"{what} is not trained yet: {file} does not exist.",
            hint="Run the stage that trains it first.",
        )
    return _read(file)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _latest(where: Path) -> Path:
    return where.with_name(f"{where.name}.latest.safetensors")


def _save_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: _Average,
    state: _State,
    where: Path,
) -> None:
    """One file, so that its parts cannot be of two epochs."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "weight": network.state_dict(),
        "average": average.mean,
        **{f"optimizer.{i}": each for i, each in optimizer.state_dict()["state"].items()},
    }
    tensors = {
        f"{part}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    said = json.dumps(asdict(state))
    first_process(lambda: write_file(_latest(where), save(tensors, {"state": said})))


def _resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: _Average, where: Path
) -> _State:
    if not finished(_latest(where)):
        return _State()
    tensors, said = _read(_latest(where))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, key = name.partition("/")
        parts.setdefault(part, {})[key] = value
    network.load_state_dict(parts.pop("weight"))
    average.mean.update(parts.pop("average", {}))
    kept = {int(part.partition(".")[2]): values for part, values in parts.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
    return _State(**json.loads(said["state"]))


# ---- what is seen of it


def _report(where: Path, state: _State, board: SummaryWriter | None, bar: Any) -> None:
    if board is None:
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in state.log:
        writer.writerow(["" if v is None else round(v, 6) for v in row])
    write_file(where.with_name(f"{where.name}.csv"), text.getvalue().encode())
    values = dict(zip(COLUMNS, state.log[-1], strict=True))
    for name in ("lr", "loss", "pseudo_dice", "ema_pseudo_dice"):
        if values[name] is not None:
            board.add_scalar(name, values[name], state.epoch)
    bar.set_postfix_str(f"loss {values['loss']:.4f}")
    if bar.disable:  # no terminal: plain lines
        print(f"{where.name}: epoch {state.epoch}, loss {values['loss']:.4f}", file=sys.stderr)


@contextmanager
def _board(where: Path, state: _State) -> Iterator[SummaryWriter | None]:
    """TensorBoard's log of the first process; what a killed run wrote too much is hidden."""
    if _rank() != 0:
        yield None
        return
    folder = where.parent / "tensorboard" / where.name
    with SummaryWriter(str(folder), purge_step=state.epoch + 1) as writer:
        yield writer


def _bar(where: Path, stage: StageConfig, state: _State) -> Any:
    return tqdm(
        desc=where.name,
        total=stage.epochs * stage.iterations,
        initial=state.epoch * stage.iterations,
        disable=_rank() != 0 or not sys.stderr.isatty(),
        unit="step",
    )
