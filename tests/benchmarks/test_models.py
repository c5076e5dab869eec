"""The full-size network is the published one, its weights are the golden data's kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import TINY
from mome_sdk.benchmarks import models
from mome_sdk.benchmarks.models import (
    FULL_SIZE,
    FULL_SIZE_PATCH,
    example_image,
    full_size_bundle,
    random_tensors,
    window_gflop,
)
from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import BundleError


def test_full_size_has_the_published_number_of_weights_and_operations():
    shapes = FULL_SIZE.tensor_shapes().values()
    assert sum(int(np.prod(shape)) for shape in shapes) == 187_318_244
    # 3.154 TMAC for a window, counted with PyTorch's flop counter on the published code.
    assert window_gflop(FULL_SIZE, FULL_SIZE_PATCH) == pytest.approx(6308, rel=1e-3)


def test_weights_are_scaled_as_in_the_golden_data_and_always_the_same():
    tensors = random_tensors(TINY)
    again = random_tensors(TINY)
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, again[name])
        assert values.dtype == np.float32
        assert np.abs(values).min() > 0
    wide = tensors["experts.0.encoder.stages.2.0.convs.1.conv.weight"]
    assert wide.std() == pytest.approx(np.sqrt(2.0 / (8 * 27)), rel=0.1)
    head = tensors["gate.decoder.seg_layers.0.weight"]
    assert head.std() == pytest.approx(np.sqrt(2.0 / 8) / 2, rel=0.4)
    norms = np.concatenate([v for n, v in tensors.items() if n.endswith("norm.weight")])
    assert norms.mean() == pytest.approx(1.0, abs=0.05)
    assert norms.std() == pytest.approx(0.1, rel=0.2)


def test_the_full_size_bundle_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "FULL_SIZE", TINY)
    monkeypatch.setattr(models, "FULL_SIZE_PATCH", (16, 16, 16))
    first = full_size_bundle(tmp_path / "x.bundle")
    written = (first.path / "bundle.json").stat().st_mtime_ns
    assert full_size_bundle(tmp_path / "x.bundle").sha256 == first.sha256
    assert (first.path / "bundle.json").stat().st_mtime_ns == written


def test_somebody_elses_bundle_is_not_taken_for_it(tiny_bundle: ModelBundle, tmp_path: Path):
    tiny_bundle.save(tmp_path / "mine.bundle")
    with pytest.raises(BundleError, match="not the bundle that benchmarks write") as caught:
        full_size_bundle(tmp_path / "mine.bundle")
    assert caught.value.code == "bundle.not-random"


@pytest.mark.slow
def test_the_example_is_cut_or_continued_to_any_size(tiny_bundle: ModelBundle):
    whole = example_image(tiny_bundle, (160, 196, 160))[0]
    assert whole.mean() == pytest.approx(0.0, abs=1e-3)
    np.testing.assert_array_equal(
        example_image(tiny_bundle, (16, 20, 16))[0], whole[72:88, 88:108, 72:88]
    )
    larger = example_image(tiny_bundle, (192, 196, 160))[0]
    np.testing.assert_array_equal(larger[16:176], whole)
    np.testing.assert_array_equal(larger[:16], whole[15::-1])
