"""Export folders: what is written is what is read, and an export fixes engine and precision."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import mome_sdk
from mome_sdk import Segmenter, open_engine
from mome_sdk.errors import BundleError, EngineError, InputError, MomeError
from mome_sdk.exported import ARTEFACTS, NOT_RUN, ExportedModel, load_model, parity_line
from mome_sdk.volume import Volume

SCHEMA = json.loads((Path(mome_sdk.__file__).parent / "schemas" / "export.schema.json").read_text())


@pytest.fixture
def folder(onnx_export, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(onnx_export.path, tmp_path / "copy"))


def refused(path: Path) -> MomeError:
    with pytest.raises(BundleError) as caught:
        ExportedModel.load(path)
    assert "\n" not in str(caught.value)
    return caught.value


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / "export.json").read_text())
    change(manifest)
    (folder / "export.json").write_text(json.dumps(manifest))


def relist(folder: Path, name: str) -> None:
    """Make the manifest agree with an altered file."""
    data = (folder / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_manifest_follows_the_schema(onnx_export, folder):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(onnx_export.manifest, SCHEMA)
    edit(folder, lambda manifest: manifest.update(parity=NOT_RUN, batch=None))
    jsonschema.validate(ExportedModel.load(folder).manifest, SCHEMA)


def test_an_export_describes_its_bundle(onnx_export, tiny_bundle):
    model = load_model(onnx_export.path)
    assert isinstance(model, ExportedModel)
    assert (model.target, model.kind, model.precision) == ("onnx", "onnx", "fp32")
    assert (model.experts, model.batch, model.file.name) == ("grouped", None, "model.onnx")
    for name in ("sha256", "name", "licence", "notice", "patch", "axes", "blend", "modalities"):
        assert getattr(model, name) == getattr(tiny_bundle, name)
    assert model.architecture == tiny_bundle.architecture
    np.testing.assert_array_equal(model.template.array, tiny_bundle.template.array)
    assert model.grid.matches(tiny_bundle.grid)
    assert load_model(tiny_bundle.path).kind == "bundle"


def test_reference_is_the_network_in_float32(onnx_export, tiny_bundle):
    windows, logits, against = onnx_export.reference()
    found = np.empty_like(logits)
    open_engine(tiny_bundle, "native", threads=1).run(windows, found)
    np.testing.assert_allclose(found, logits, atol=1e-5 * np.ptp(logits))
    assert against.startswith("PyTorch")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "mome-bundle"),
        ("target", "abacus"),
        ("precision", "fp8"),
        ("experts", "some"),
        ("batch", 0),
        ("patch", [16, 16]),
        ("patch", [32, 16, 16]),
        ("axes", "RAS"),
        ("modalities", ["T1"]),
        ("classes", ["background", "tumour"]),
        ("bundle", {"name": "tiny"}),
        ("fp32_tensors", "all"),
        ("parity", "fine"),
        ("parity", {"max_of_range": 0.0}),
        ("versions", {"torch": 2}),
        ("details", []),
        ("files", {}),
    ],
)
def test_manifest_with_a_wrong_value_is_refused(field, value, folder):
    edit(folder, lambda manifest: manifest.update({field: value}))
    assert refused(folder).code in ("bundle.manifest", "bundle.unknown-file")


def test_unknown_and_newer_manifests_are_refused(folder):
    edit(folder, lambda manifest: manifest.update(more=1))
    assert refused(folder).code == "bundle.manifest"
    edit(folder, lambda manifest: manifest.update(format_version=2))
    error = refused(folder)
    assert error.code == "bundle.format-version"
    assert "pip install -U" in error.hint
    (folder / "export.json").write_text("{")
    assert refused(folder).code == "bundle.manifest"


def test_every_byte_is_checked(folder):
    for name in ("model.onnx.data", "bundle.json", "reference.safetensors", "NOTICE"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert refused(folder).code == "bundle.sha256"
        (folder / name).write_bytes(data[:-1])
        assert refused(folder).code == "bundle.size"
        (folder / name).unlink()
        assert refused(folder).code == "bundle.missing-file"
        (folder / name).write_bytes(data)
    (folder / "more").touch()
    assert refused(folder).code == "bundle.unknown-file"
    (folder / "more").unlink()
    (folder / "NOTICE").rename(folder.parent / "NOTICE")
    (folder / "NOTICE").symlink_to(folder.parent / "NOTICE")
    assert refused(folder).code == "bundle.link"


def test_parts_of_different_bundles_are_refused(folder):
    description = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**description, "licence": "another"}))
    relist(folder, "bundle.json")
    assert refused(folder).code == "bundle.other"


def test_a_template_of_another_bundle_is_refused(folder):
    (folder / "NOTICE").write_text("of another template")
    relist(folder, "NOTICE")
    assert refused(folder).code == "bundle.other"


def test_a_reference_of_another_size_is_refused(folder):
    data = (folder / "reference.safetensors").read_bytes()
    (folder / "reference.safetensors").write_bytes(data.replace(b"image", b"mirage"[1:]))
    relist(folder, "reference.safetensors")
    with pytest.raises(BundleError, match="no image of shape") as caught:
        ExportedModel.load(folder).reference()
    assert caught.value.code == "bundle.tensors"


def test_a_file_or_nothing_is_no_export(tmp_path, onnx_export):
    assert refused(onnx_export.file).code == "bundle.not-a-bundle"
    assert refused(tmp_path / "nowhere").code == "bundle.not-found"
    assert refused(tmp_path).code == "bundle.not-a-bundle"


@pytest.mark.parametrize("engine", ["auto", "onnxruntime", "openvino"])
def test_an_export_segments_like_its_bundle(engine, onnx_export, tiny_bundle):
    image = np.random.default_rng(0).normal(size=(1, 17, 16, 20)).astype(np.float32)
    with Segmenter(tiny_bundle, "native", space="model", threads=1) as segmenter:
        expected = segmenter.logits(image)
    with Segmenter(onnx_export.path, engine, space="model", threads=1) as segmenter:
        found = segmenter.logits(image)
        volume = Volume(image[0] + 5, np.diag((1.0, 1.0, 1.0, 1.0)))
        result = segmenter.predict(volume, shares=True)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))
    made = result.provenance
    assert made["engine"] == ("onnxruntime" if engine == "auto" else engine)
    assert made["bundle_sha256"] == tiny_bundle.sha256
    assert made["export"] == {
        "target": "onnx",
        "experts": "grouped",
        "sha256": onnx_export.export_sha256,
    }
    assert result.expert_share is not None


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"name": "native"}, "argument.engine", "one of: auto, onnxruntime, openvino"),
        ({"name": "torch"}, "argument.engine", "does not run an export for onnx"),
        ({"precision": "fp16"}, "engine.precision", "exported in fp32, fp16 was asked for"),
        ({"precision": "bf16", "name": "openvino"}, "engine.precision", "exported in fp32"),
        ({"device": "cuda:0"}, "engine.none", "an export for onnx on cuda:0 in fp32"),
    ],
)
def test_an_export_fixes_engine_and_precision(options, code, text, onnx_export):
    with pytest.raises((InputError, EngineError), match=text) as caught:
        open_engine(onnx_export, **options)
    assert caught.value.code == code
    assert open_engine(onnx_export, precision="fp32", threads=1).precision == "fp32"


def test_windows_of_another_size_are_refused(onnx_export):
    engine = open_engine(onnx_export, threads=1)
    image = np.zeros((1, 1, 16, 16, 20), np.float32)
    with pytest.raises(EngineError, match=r"\(16, 16, 16\)") as caught:
        engine.run(image, np.empty((1, 2, 16, 16, 20), np.float32))
    assert caught.value.code == "engine.buffers"


def test_half_precision_with_a_fixed_batch(fp16_export, tiny_bundle):
    engine = open_engine(fp16_export, threads=1)
    assert (engine.name, engine.precision, engine.batch) == ("onnxruntime", "fp16", 2)
    with pytest.raises(EngineError, match="B 2") as caught:
        engine.run(np.zeros((1, 1, 16, 16, 16), np.float32), np.empty((1, 2, 16, 16, 16), "f4"))
    assert caught.value.code == "engine.buffers"
    with pytest.raises(EngineError) as caught:
        open_engine(fp16_export, "openvino")
    assert caught.value.code == "engine.precision"
    # 3 windows: the last call is filled up.
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 32)).astype(np.float32)
    with Segmenter(tiny_bundle, "native", space="model", threads=1) as segmenter:
        expected = segmenter.logits(image)
    with Segmenter(fp16_export, space="model", threads=1) as segmenter:
        found = segmenter.logits(image)
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.ptp(expected))


def test_every_target_has_a_file_of_its_own_kind():
    assert {Path(names[0]).suffix for names in ARTEFACTS.values()} == {
        *(".onnx", ".plan", ".pt2", ".ts")
    }
    assert all(json.dumps(target) in json.dumps(SCHEMA) for target in ARTEFACTS)


def test_parity_reads_as_a_sentence(onnx_export):
    said = parity_line(onnx_export.manifest["parity"])
    assert "of 4,096 voxels get another class" in said
    assert "against PyTorch" in said
    assert "--check" in parity_line(NOT_RUN)
