"""`mome export`: one folder per target, whole or not at all, and what the user is told."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, random_tensors
from mome_sdk.bundle import create_bundle
from mome_sdk.cli import main
from mome_sdk.errors import EngineError, InputError
from mome_sdk.export import targets
from mome_sdk.export.targets import TARGETS, Target, export_bundle, make_job
from mome_sdk.exported import ARTEFACTS, FROM_BUNDLE, NOT_RUN


def test_a_folder_holds_all_that_running_needs(onnx_export, tiny_bundle):
    names = {path.name for path in onnx_export.path.iterdir()}
    assert names == {*FROM_BUNDLE, *ARTEFACTS["onnx"], "export.json", "reference.safetensors"}
    for name in FROM_BUNDLE:
        assert (onnx_export.path / name).read_bytes() == (tiny_bundle.path / name).read_bytes()


def test_the_manifest_says_what_was_measured(onnx_export, fp16_export):
    exact, half = onnx_export.manifest["parity"], fp16_export.manifest["parity"]
    assert exact["max_of_range"] < 1e-5
    assert (exact["flips"], exact["voxels"], exact["where"]) == (0, 16**3, "onnxruntime, cpu")
    assert 1e-5 < half["max_of_range"] < 1e-2
    assert half["rms"] < half["max_of_range"]
    assert half["voxels"] == 2 * 16**3
    assert fp16_export.manifest["fp32_tensors"] == []
    assert set(onnx_export.manifest["versions"]) == {"mome-sdk", "torch", "onnx", "onnxscript"}
    # Ten and a head, of the experts and of the gate, whose first convolution is two.
    assert onnx_export.details["operators"]["Conv"] == 23


def test_what_stays_in_float32_is_in_the_manifest(tmp_path):
    tensors = random_tensors(TINY)
    tensors["experts.0.encoder.stages.0.0.convs.0.conv.weight"] *= 1e6
    bundle = create_bundle(
        tmp_path / "b", TINY, tensors, name="b", patch=(16,) * 3, blend="exact", training={}
    )
    made = export_bundle(bundle, tmp_path / "out", "torchscript", precision="fp16")
    assert made.manifest["fp32_tensors"] == ["experts.encoder.0.0.conv"]
    assert made.manifest["parity"]["max_of_range"] < 1e-2


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"target": "abacus"}, "argument.target"),
        ({"precision": "bf16"}, "argument.precision"),
        ({"experts": "none"}, "argument.experts"),
        ({"batch": 0}, "argument.batch"),
        ({"out": "export.zip"}, "argument.output"),
        ({"out": "no/where"}, "argument.output-folder"),
    ],
)
def test_wrong_arguments_are_refused(options, code, tiny_bundle, tmp_path):
    wanted = {"out": "export", "target": "onnx", **options}
    with pytest.raises(InputError) as caught:
        export_bundle(tiny_bundle, tmp_path / wanted.pop("out"), **wanted)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_wrong_is_not_published(tiny_bundle, tmp_path, monkeypatch):
    def write(job, folder):
        network = job.network
        network.gate.head.bias.data.add_(0.5)
        return targets.write_torchscript(job, folder)

    monkeypatch.setitem(TARGETS, "torchscript", Target(write, ("torch",)))
    with pytest.raises(EngineError, match="of their range") as caught:
        export_bundle(tiny_bundle, tmp_path / "out", "torchscript")
    assert caught.value.code == "engine.parity"
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_no_numbers_is_not_exported(tmp_path):
    tensors = random_tensors(TINY)
    tensors["gate.decoder.seg_layers.1.bias"][:] = np.inf
    bundle = create_bundle(
        tmp_path / "b", TINY, tensors, name="b", patch=(16,) * 3, blend="exact", training={}
    )
    with pytest.raises(EngineError, match="float32") as caught:
        export_bundle(bundle, tmp_path / "out", "torchscript")
    assert caught.value.code == "engine.not-finite"
    assert not (tmp_path / "out").exists()


def test_ranges_are_measured_on_windows_with_room_at_the_bottom(tiny_bundle):
    assert targets._ranged_edge(4) == targets._ranged_edge(32) == 64
    assert targets._ranged_edge(48) == 96
    job = make_job(tiny_bundle, precision="fp16", experts="separate", batch=3)
    assert job.example().shape == (3, 1, 16, 16, 16)


def test_a_file_that_cannot_run_here_says_so(tiny_bundle, tmp_path, monkeypatch, capsys):
    def missing(*_: object, **__: object) -> None:
        raise EngineError("engine.missing", "The engine needs a package.")

    monkeypatch.setattr("mome_sdk.engines.ENGINES", {"torch": missing})
    monkeypatch.setattr(targets, "float32_logits", lambda _, w: (np.repeat(w, 2, 1), "a test"))
    made = export_bundle(tiny_bundle, tmp_path / "out", "torchscript")
    assert made.manifest["parity"] == NOT_RUN
    assert main(["inspect", str(made.path)]) == 0
    assert "not run here: `mome export --check` measures it" in capsys.readouterr().out


# ---- the command


def test_the_command_exports_inspects_and_checks(tiny_bundle, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["export", str(tiny_bundle.path), "--target", "torchscript", "-o", out]
    assert main([*words, "--experts", "separate", "--batch", "1"]) == 0
    said = capsys.readouterr()
    assert "torchscript, fp32, separate experts" in said.out
    assert re.search(r"parity: \d\.\de-\d\d of the logits' range", said.out)
    assert "deprecated TorchScript" in said.err
    assert "torchscript: comparing the file with it" in said.err
    assert main(["inspect", out]) == 0
    said = capsys.readouterr().out
    for part in ("torchscript", "separate", "fp32", tiny_bundle.sha256, "model.ts", "parity"):
        assert part in said
    assert main(["export", "--check", out]) == 0
    assert "0 of 4,096 voxels get another class" in capsys.readouterr().out
    assert main([*words]) == 2
    assert "[argument.output]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "BUNDLE, --target and -o"),
        (["demo"], "BUNDLE, --target and -o"),
        (["demo", "--check", "x"], "--check stands beside"),
        (["--check", "nowhere"], "[bundle.not-found]"),
        (["demo", "--target", "abacus"], "abacus"),
    ],
)
def test_wrong_usage_is_one_line(words, text, capsys):
    assert main(["export", *words]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1


def test_check_finds_a_file_that_changed_its_mind(onnx_export, tmp_path, capsys):
    """A folder whose every checksum is right and whose reference is another network's."""
    from test_exported import relist

    copy = Path(shutil.copytree(onnx_export.path, tmp_path / "copy"))
    data = bytearray((copy / "reference.safetensors").read_bytes())
    data[-4:] = np.float32(1e6).tobytes()
    (copy / "reference.safetensors").write_bytes(bytes(data))
    relist(copy, "reference.safetensors")
    assert main(["export", "--check", str(copy)]) == 2
    assert "[engine.parity]" in capsys.readouterr().err


def test_predict_takes_an_export_folder(onnx_export, tmp_path, capsys):
    from mome_sdk.nifti import write_nifti
    from mome_sdk.volume import Volume

    array = np.random.default_rng(0).normal(100.0, 20.0, (18, 20, 22))
    write_nifti(Volume(array, np.diag((-1.0, 1.0, 1.0, 1.0))), tmp_path / "scan.nii.gz")
    words = ["predict", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")]
    words += ["--model", str(onnx_export.path), "--space", "model"]
    assert main(words) == 0
    assert "onnxruntime, fp32" in capsys.readouterr().out
    assert main([*words, "--precision", "fp16"]) == 2
    assert "[engine.precision]" in capsys.readouterr().err
    assert main([*words, "--engine", "native"]) == 2
    assert "[argument.engine]" in capsys.readouterr().err


def test_a_missing_exporter_is_named(tiny_bundle, tmp_path):
    words = ["export", str(tiny_bundle.path), "--target", "onnx", "-o", str(tmp_path / "x")]
    program = f"""
import sys
sys.modules["onnxscript"] = None
from mome_sdk.cli import main
sys.exit(main({words}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert 'pip install "mome-sdk[export]"' in done.stderr
