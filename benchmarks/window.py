"""Sliding windows side by side: the same network, windows, step and Gaussian."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import Engine, open_engine
from mome_sdk.segmenter import MIRRORS, Mirror
from mome_sdk.sliding_window import SlidingWindow

from .anchors import (
    FusedLogits,
    Predictor,
    at_corners,
    blended,
    mirrored,
    monai,
    monai_starts,
    nnunet,
    window_weights,
)
from .measure import Missing, Row, Sample, Table, compare, interleave, say
from .models import example_image

OURS = "mome_sdk"
# nnU-Net weighs and adds up in half precision, where the small weights near the edges of a window
# keep few bits: of this its parity figure speaks, its network is float32.
HALF_BLEND_LIMIT = 0.1

Array = NDArray[np.float32]
Run = Callable[[], Array]


def run(bundle: ModelBundle, *, threads: int, rounds: int, mirror: Mirror = "none") -> Table:
    """Seconds of three implementations, in the network and outside of it (`windows`).

    Args:
        bundle: The model, computed by PyTorch in all of them.
        threads: Of PyTorch and of our runner.
        rounds: Measurements of each.
        mirror: "none", or "all"; MONAI has no mirroring of its own, the network does it there.

    The image is one and a half windows long, so that all three lay the same eight windows. The
    parity figure is against these windows, blended in float64.
    """
    patch = bundle.patch
    image = example_image(bundle, (patch[0] * 3 // 2, patch[1] * 3 // 2, patch[2] * 3 // 2))
    window = SlidingWindow(patch, mirror=MIRRORS[mirror], threads=threads)
    starts = window.starts(image.shape[1:])
    assert list(map(list, starts)) == monai_starts(image.shape[1:], patch)
    work = {
        "model": bundle.name,
        "patch": list(patch),
        "image": list(image.shape[1:]),
        "windows": prod(map(len, starts)),
        "mirror": mirror,
        "threads": threads,
    }
    table = Table("window", work)
    torch.set_num_threads(threads)
    network = TimedNetwork(FusedLogits(bundle))
    say("reference: the windows one by one, blended in float64")
    forward = mirrored(network, MIRRORS[mirror])
    weights = window_weights(patch, "exact", torch.float64)
    with torch.inference_mode():
        logits_at = at_corners(forward, torch.from_numpy(image), patch)
        expected = blended(logits_at, image.shape[1:], starts, weights).numpy()
    engine = TimedEngine(open_engine(bundle, "torch", threads=threads))
    subjects = {OURS: _Timed(partial(window.run, engine, image), engine)}
    subjects |= _others(bundle, network, image, MIRRORS[mirror], table)
    for name, subject in subjects.items():
        say(f"warming up {name}")
        subject()
    samples = interleave(subjects, rounds)
    for name, subject in subjects.items():
        parity = compare(
            subject.logits, expected, "the same windows of PyTorch, blended in float64"
        )
        details = {"blend": "fp16" if name == "nnU-Net" else "fp32"}
        row = Row(name, "fp32", samples[name], parity, baseline=OURS, details=details)
        table.add(row, limit=HALF_BLEND_LIMIT if name == "nnU-Net" else None)
    return table


class TimedEngine:
    """An engine that counts the seconds spent in it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.batch, self.channels = engine.batch, engine.channels
        self.classes, self.experts = engine.classes, engine.experts
        self.seconds = 0.0

    def run(
        self, windows: Array, logits: Array, shares: Array | None = None, stream: Any = None
    ) -> None:
        start = time.perf_counter()
        self._engine.run(windows, logits, shares, stream)
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._engine.close()


class TimedNetwork(nn.Module):
    """A network that counts the seconds spent in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        logits: Tensor = self._network(x)
        self.seconds += time.perf_counter() - start
        return logits


class _Timed:
    """One way over the image, split into the network's seconds and all others."""

    def __init__(self, run: Run, clock: TimedEngine | TimedNetwork) -> None:
        self._run = run
        self._clock = clock

    def __call__(self) -> Sample:
        before = self._clock.seconds
        start = time.perf_counter()
        self.logits = self._run()
        total = time.perf_counter() - start
        network = self._clock.seconds - before
        return {"network": network, "windows": total - network}


def _others(
    bundle: ModelBundle, network: TimedNetwork, image: Array, axes: tuple[int, ...], table: Table
) -> Mapping[str, _Timed]:
    """nnU-Net and MONAI, those that are installed."""
    weights = window_weights(bundle.patch, "exact", torch.float32)
    classes = bundle.architecture.classes
    builders = {
        "nnU-Net": partial(nnunet, network, bundle.patch, axes, classes),
        "MONAI": partial(monai, mirrored(network, axes), weights, batch=1),
    }
    found = {}
    for name, build in builders.items():
        try:
            predict = build()
        except ModuleNotFoundError as error:
            reason = f'the package {error.name} is not installed: pip install "mome-sdk[bench]"'
            table.missing.append(Missing(name, reason))
        else:
            found[name] = _Timed(partial(_predicted, predict, image), network)
    return found


def _predicted(predict: Predictor, image: Array) -> Array:
    logits: Array = predict(torch.from_numpy(image)).numpy()
    return logits
