"""One training step of the published size: what recomputing activations saves and costs."""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mome_sdk.architecture import Architecture
from mome_sdk.network import MoME
from mome_sdk.training.batch import Batch, Origin
from mome_sdk.training.config import JointConfig, LossConfig
from mome_sdk.training.mome import Mome

from .measure import Missing, Parity, Row, Table, say

PUBLISHED = Architecture((32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2), (2,) * 6, (2,) * 5)
MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "DWI")
EDGES = (96, 128)  # both ways of the first; of the second, recomputing alone
PROGRESS = 0.5  # of the curriculum: all networks have gradients
GRADIENT_LIMIT = 1e-4


def run(*, threads: int, edges: tuple[int, int] = EDGES, arch: Architecture = PUBLISHED) -> Table:
    """Memory and seconds of a joint step, batch 1, float32, on the CPU.

    The activation memory of a row is the process's largest resident memory in the step, less what
    it had before: weights, gradients and momentum are there by then. Beside it stands what
    autograd keeps of the plain step, counted on tensors without memory (meta device).

    Args:
        threads: Of PyTorch.
        edges: Of the cubic windows.
        arch: Of the networks.

    The parity of the recomputed step is that of its gradients with the plain step's. Of the larger
    window there is no plain step: there it is that of the fused logits without gradients.
    """
    small, large = edges
    work = {"batch": 1, "threads": threads, "edges": list(edges), "optimiser": "sgd, momentum"}
    table = Table("training", work)
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        jobs = {
            f"plain, {small}": ("plain", small),
            f"recomputed, {small}": ("checkpoint", small),
            f"recomputed, {large}": ("checkpoint", large),
        }
        found: dict[str, dict[str, Any]] = {}
        for name, (memory, edge) in jobs.items():
            say(f"one step: {name}")
            where = Path(folder, f"{memory}-{edge}.npy")
            found[name] = _in_process(arch, memory, edge, threads, where, edge == large)
    plain = found[f"plain, {small}"]
    for name, (memory, edge) in jobs.items():
        row = found[name]
        gradients = edge == small
        against = "gradients of the plain step" if gradients else "logits without gradients"
        parity = parity_of(
            row["values"], plain["values"] if gradients else row["expected"], against
        )
        details = {
            "activations_mb": row["activations_mb"],
            "share_of_plain": row["activations_mb"] / plain["activations_mb"]
            if gradients
            else None,
            "peak_mb": row["peak_mb"],
            "plain_kept_by_autograd_mb": saved_mb(arch, edge),
        }
        baseline = None if memory == "plain" or not gradients else f"plain, {small}"
        table.add(
            Row(
                name, "fp32", [{"step": row["seconds"]}], parity, baseline=baseline, details=details
            ),
            limit=GRADIENT_LIMIT,
        )
    table.missing.append(
        Missing(
            f"plain, {large}", "not run: autograd keeps more than most machines have, see above"
        )
    )
    return table


def _in_process(
    arch: Architecture, memory: str, edge: int, threads: int, where: Path, logits: bool
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        said = pool.apply(measure_step, (arch, memory, edge, threads, where, logits))
    values = np.load(where)
    expected = np.load(where.with_suffix(".expected.npy")) if logits else None
    return {**said, "values": values, "expected": expected}


def measure_step(
    arch: Architecture, memory: str, edge: int, threads: int, where: Path, logits: bool
) -> Mapping[str, float]:
    """One step in this process; gradients, or fused logits, go to a file.

    Returns:
        activations_mb, peak_mb, seconds.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    system, model = _system(arch, memory), None
    model = system.network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.99, nesterov=True)
    least = 2 * 2 ** (arch.stages - 1)
    system.loss(_batch(least), PROGRESS).backward()  # leaves gradients and momentum behind
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    batch = _batch(edge)
    if logits:
        with torch.no_grad():
            expected = model(batch.images).fused[0].numpy()
        np.save(where.with_suffix(".expected.npy"), expected)
        with torch.no_grad():
            np.save(where, system.output(batch.images, 1).fused[0].numpy())
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    started = time.monotonic()
    system.loss(batch, PROGRESS).backward()
    optimizer.step()
    seconds, peak = time.monotonic() - started, _resident_mb("VmHWM")
    if not logits:
        gradients = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
        np.save(where, torch.cat(gradients).numpy())
    return {"activations_mb": peak - before, "peak_mb": peak, "seconds": seconds}


def _system(arch: Architecture, memory: str) -> Mome:
    joint = JointConfig(
        epochs=800,
        iterations=250,
        batch=1,
        lr=1e-3,
        gate_lr=1e-3,
        optimizer="sgd",
        weight_decay=3e-5,
        memory=memory,  # type: ignore[arg-type]
    )
    loss = LossConfig(levels=arch.stages - 1, dice_smooth=1e-5, tissue_weight=0.0)
    return Mome(MoME(arch), MODALITIES, loss, joint)


def _batch(edge: int) -> Batch:
    images = torch.randn(1, 1, edge, edge, edge, generator=torch.Generator().manual_seed(1))
    lesions = (images[:, 0] > 2).to(torch.uint8)
    return Batch(images, lesions, (Origin("FLAIR"),))


def _resident_mb(name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def saved_mb(arch: Architecture, edge: int) -> float:
    """What autograd keeps of the plain step until its backward pass, each storage once."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        kept.append(storage)  # so that no other takes its name
        return tensor

    kept: list[torch.UntypedStorage] = []
    with torch.device("meta"):
        system = _system(arch, "plain")
        images = torch.empty(1, 1, edge, edge, edge)
        weights = {w.untyped_storage()._cdata for w in system.network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = system.output(images, arch.stages - 1)
    del output
    return sum(size for name, size in sizes.items() if name not in weights) / 2**20


def parity_of(found: NDArray[np.float32], expected: NDArray[np.float32], against: str) -> Parity:
    """Of numbers in any shape: no classes to flip."""
    difference = np.subtract(found, expected, dtype=np.float64)
    spread = float(expected.std(dtype=np.float64))
    return Parity(
        max=float(np.abs(difference).max() / max(float(np.ptp(expected)), 1e-30)),
        rms=float(np.sqrt(np.mean(difference**2)) / max(spread, 1e-30)),
        flips=0,
        voxels=int(found.size),
        against=against,
    )
