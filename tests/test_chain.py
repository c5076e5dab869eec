"""The whole way: train, import, export, predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from labelmap import tiny_config, write_labelmap
from mome_sdk.cli import main
from mome_sdk.exported import ExportedModel
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.training import stages
from mome_sdk.volume import Volume


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).normal(100.0, 20.0, (20, 18, 22))
    write_nifti(Volume(array, np.eye(4)), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.mark.slow
def test_a_trained_run_is_exported_and_finds_what_its_bundle_finds(tmp_path, scan, capsys):
    config = tiny_config()
    write_labelmap(tmp_path / "head.nii.gz")
    stages.train(config, tmp_path, tmp_path / "run", stage="all", experts=config.modalities)
    bundle, export = str(tmp_path / "bundle"), str(tmp_path / "export")
    assert main(["import", str(tmp_path / "run"), "-o", bundle]) == 0
    assert main(["export", bundle, "--target", "onnx", "-o", export]) == 0
    made = ExportedModel.load(export)
    assert made.modalities == config.modalities
    assert made.manifest["parity"]["max_of_range"] < 1e-4

    plan = str(tmp_path / "plan")
    aimed = ["--target", "tensorrt-rtx", "--precision", "fp16", "--sm", "80", "--batch", "2"]
    assert main(["export", bundle, *aimed, "-o", plan]) == 0
    planned = ExportedModel.load(plan)
    assert (planned.target, planned.batch, planned.details["sms"]) == ("tensorrt-rtx", 2, [80])
    assert planned.sha256 == made.sha256

    capsys.readouterr()
    found = {}
    for model in (bundle, export):
        mask = tmp_path / f"{Path(model).name}.nii.gz"
        words = ["predict", str(scan), "-o", str(mask), "--model", model, "--space", "model"]
        assert main([*words, "--report", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert set(record["expert_share"]) == set(config.modalities), "shares are in every target"
        found[model] = read_nifti(mask).array, record
    np.testing.assert_array_equal(found[bundle][0], found[export][0])
    shares = [
        {name: part["brain"] for name, part in found[model][1]["expert_share"].items()}
        for model in (bundle, export)
    ]
    assert shares[1] == pytest.approx(shares[0], abs=1e-4)
    assert found[export][1]["provenance"]["export"]["target"] == "onnx"
