"""The engines side by side: one window of the demonstration model, same numbers in, float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mome_sdk import ModelBundle, open_engine
from mome_sdk._core import default_threads
from mome_sdk.engines import ENGINES

REFERENCE = "torch"
TOLERANCE = 1e-4  # of the logit range: what the engines' own tests allow


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.load("demo")


@pytest.fixture(scope="module")
def window(bundle: ModelBundle) -> NDArray[np.float32]:
    shape = (1, bundle.architecture.in_channels, *bundle.patch)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def reference(bundle: ModelBundle, window: NDArray[np.float32]) -> NDArray[np.float32]:
    logits = np.empty((1, bundle.architecture.classes, *bundle.patch), dtype=np.float32)
    engine = open_engine(bundle, REFERENCE)
    engine.run(window, logits)
    engine.close()
    return logits


@pytest.mark.parametrize("name", ENGINES)
def bench_engine(
    benchmark: Any,
    name: str,
    bundle: ModelBundle,
    window: NDArray[np.float32],
    reference: NDArray[np.float32],
) -> None:
    engine = open_engine(bundle, name)
    logits = np.empty_like(reference)
    benchmark.pedantic(engine.run, (window, logits), rounds=10, warmup_rounds=1, iterations=1)
    engine.close()
    benchmark.extra_info.update(
        parity=float(np.abs(logits - reference).max() / np.ptp(reference)),
        parity_of=f"of the logit range, against {REFERENCE}",
        windows=1,
        mirror=1,
        threads=default_threads(),
        precision=engine.precision,
    )
    assert benchmark.extra_info["parity"] <= TOLERANCE
