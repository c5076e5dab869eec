"""A long run: memory stays where it is, and threads do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from mome_sdk.bundle import ModelBundle
from mome_sdk.segmenter import Segmenter
from mome_sdk.volume import Volume


def volume(seed: int) -> Volume:
    return Volume(np.random.default_rng(seed).normal(size=(16, 16, 16)), np.eye(4))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "onnxruntime", "openvino"])
def test_a_thousand_predictions_take_no_more_memory(engine: str, tiny_bundle: ModelBundle) -> None:
    process = psutil.Process()
    with Segmenter(tiny_bundle, engine, space="model", threads=1) as segmenter:
        for done in range(1, 1001):
            result = segmenter.predict(volume(done), shares=True)
            assert result.lesions is not None
            if done == 50:
                before = process.memory_info().rss
    assert process.memory_info().rss < 1.01 * before


@pytest.mark.slow
def test_eight_threads_give_what_one_gives(tiny_bundle: ModelBundle) -> None:
    with Segmenter(tiny_bundle, space="model") as segmenter:
        alone = [segmenter.predict(volume(seed)).probability for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                together = pool.map(lambda seed: segmenter.predict(volume(seed)), range(8))
                for expected, found in zip(alone, together, strict=True):
                    np.testing.assert_array_equal(found.probability, expected)
