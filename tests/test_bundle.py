"""Bundles: what is written is what is read, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import mome_sdk
from conftest import TINY, random_tensors
from mome_sdk import Grid, ModelBundle
from mome_sdk.bundle import create_bundle, tensor_places
from mome_sdk.errors import BundleError, InputError, MomeError

SCHEMA = json.loads((Path(mome_sdk.__file__).parent / "schemas" / "bundle.schema.json").read_text())
INFO = {"name": "tiny", "patch": (16, 16, 16), "blend": "exact", "training": {"epochs": 1}}


@pytest.fixture
def folder(tiny_bundle, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


def refused(path: Path) -> MomeError:
    with pytest.raises(BundleError) as caught:
        ModelBundle.load(path)
    assert "\n" not in str(caught.value)
    return caught.value


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / "bundle.json").read_text())
    change(manifest)
    (folder / "bundle.json").write_text(json.dumps(manifest))


def relist(folder: Path, name: str) -> None:
    """Make the manifest agree with an altered member."""
    data = (folder / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_what_is_written_is_what_is_read(tiny_bundle):
    written = random_tensors(TINY)
    assert list(tiny_bundle.tensors) == list(written)
    for name, tensor in written.items():
        np.testing.assert_array_equal(tiny_bundle.tensors[name], tensor)
    assert tiny_bundle.architecture == TINY
    assert tiny_bundle.modalities == ("T1", "T1ce", "T2", "FLAIR", "DWI")
    assert tiny_bundle.classes == ("background", "lesion")
    assert (tiny_bundle.patch, tiny_bundle.axes) == ((16, 16, 16), "SAR")
    assert (tiny_bundle.spacing_mm, tiny_bundle.blend) == ((1.0, 1.0, 1.0), "exact")
    assert "not a medical device" in tiny_bundle.notice


def test_weights_cannot_be_changed_through_the_bundle(tiny_bundle):
    tensor = next(iter(tiny_bundle.tensors.values()))
    with pytest.raises(ValueError, match="read-only"):
        tensor[...] = 0


def test_every_tensor_begins_at_a_multiple_of_64_bytes(tiny_bundle):
    places = tensor_places(tiny_bundle.path / "weights.safetensors")
    assert all(places[name][0] % 64 == 0 for name in tiny_bundle.tensors)
    assert all(t.ctypes.data % 64 == 0 for t in tiny_bundle.tensors.values())


def test_weights_file_is_readable_by_the_formats_own_library(tiny_bundle):
    from safetensors import safe_open

    with safe_open(tiny_bundle.path / "weights.safetensors", "numpy") as file:
        for name, tensor in tiny_bundle.tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
        numbers = json.loads(file.metadata()["architecture"])
        assert json.loads(file.metadata()["patch"]) == [16, 16, 16]
    assert numbers == tiny_bundle.manifest["architecture"]


def test_graph_holds_no_weights_of_its_own(tiny_bundle):
    assert tiny_bundle.manifest["files"]["model.onnx"]["bytes"] < 100_000


def test_manifest_follows_the_schema(tiny_bundle):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(tiny_bundle.manifest, SCHEMA)


def test_grid_is_a_box_of_the_template_around_its_brain(tiny_bundle):
    assert tiny_bundle.grid.shape == (160, 196, 160)
    assert tiny_bundle.grid.matches(tiny_bundle.template.grid.crop((20, 20, 0), (160, 196, 160)))
    mask = tiny_bundle.brain_mask
    assert mask.grid.matches(tiny_bundle.template.grid)
    assert set(np.unique(mask.array)) == {0, 1}
    inside = mask.crop((20, 20, 0), (160, 196, 160)).array
    assert inside.sum() == mask.array.sum() == 1_882_989


def test_zip_is_the_same_bundle(tiny_bundle, tmp_path):
    zipped = tiny_bundle.save(tmp_path / "tiny.zip")
    assert zipped.sha256 == tiny_bundle.sha256
    assert zipped.manifest == tiny_bundle.manifest
    assert zipped.template.grid.matches(tiny_bundle.template.grid)
    for name, tensor in tiny_bundle.tensors.items():
        np.testing.assert_array_equal(zipped.tensors[name], tensor)
        assert zipped.tensors[name].ctypes.data % 64 == 0


def test_zip_of_another_program_may_put_tensors_at_odd_addresses(tiny_bundle, tmp_path):
    path = tmp_path / "foreign.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.write(tiny_bundle.path / "bundle.json", "bundle.json")
        for name in tiny_bundle.manifest["files"]:
            archive.write(tiny_bundle.path / name, name)
    loaded = ModelBundle.load(path)
    for name, tensor in tiny_bundle.tensors.items():
        assert loaded.tensors[name].flags.aligned
        np.testing.assert_array_equal(loaded.tensors[name], tensor)


def test_saving_copies_every_byte_and_never_overwrites(tiny_bundle, tmp_path):
    copy = tiny_bundle.save(tmp_path / "copy")
    assert copy.sha256 == tiny_bundle.sha256
    with pytest.raises(InputError) as caught:
        tiny_bundle.save(tmp_path / "copy")
    assert caught.value.code == "argument.output"
    with pytest.raises(InputError) as caught:
        tiny_bundle.save(tmp_path / "nowhere" / "copy")
    assert caught.value.code == "argument.output-folder"


def test_a_bundle_that_cannot_be_finished_leaves_nothing(tmp_path):
    def break_off(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left") as caught:
        create_bundle(tmp_path / "b", TINY, random_tensors(TINY), **INFO, graph=break_off)
    assert caught.value.code == "argument.output"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("gate.decoder.seg_layers.1.bias"), "1 tensors are missing"),
        (lambda t: t.update({"gate.extra": np.zeros(1, np.float32)}), "gate.extra"),
        (lambda t: t.update({"gate.decoder.seg_layers.1.bias": np.zeros(2, np.float32)}), "shape"),
        (lambda t: t.update({"gate.decoder.seg_layers.1.bias": np.zeros(10)}), "float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, text, tmp_path):
    tensors = random_tensors(TINY)
    change(tensors)
    with pytest.raises(BundleError, match=text) as caught:
        create_bundle(tmp_path / "b", TINY, tensors, **INFO)
    assert caught.value.code == "bundle.tensors"


def test_what_is_no_bundle_is_refused(tmp_path):
    assert refused(tmp_path / "nowhere").code == "bundle.not-found"
    assert refused(tmp_path).code == "bundle.not-a-bundle"
    (tmp_path / "text.zip").write_text("no zip at all")
    assert refused(tmp_path / "text.zip").code == "bundle.not-a-bundle"


def test_zip_that_was_cut_off_is_refused(tiny_bundle, tmp_path):
    path = tiny_bundle.save(tmp_path / "tiny.zip").path
    path.write_bytes(path.read_bytes()[:-100_000])
    assert refused(path).code == "bundle.not-a-bundle"


def test_altered_members_are_refused(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-500] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    assert refused(folder).code == "bundle.sha256"
    (folder / "weights.safetensors").write_bytes(data[:-64])
    assert refused(folder).code == "bundle.size"
    (folder / "weights.safetensors").unlink()
    assert refused(folder).code == "bundle.missing-file"


def test_unreadable_member_is_refused(folder, monkeypatch):
    real = Path.open

    def deny(self: Path, *args: object, **options: object) -> object:
        if self.name == "template.nii.gz":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", deny)
    assert refused(folder).code == "bundle.unreadable"


def test_files_that_nobody_checked_are_refused(folder):
    (folder / "extra.txt").write_text("x")
    assert refused(folder).code == "bundle.unknown-file"
    (folder / "extra.txt").unlink()
    (folder / "sub").mkdir()
    assert refused(folder).code == "bundle.unknown-file"


def test_links_are_refused(folder):
    (folder / "NOTICE").rename(folder.parent / "NOTICE")
    (folder / "NOTICE").symlink_to(folder.parent / "NOTICE")
    assert refused(folder).code == "bundle.link"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", "extra.bin"])
def test_manifest_may_only_name_members_of_a_bundle(name, folder):
    entry = {"bytes": 0, "sha256": "0" * 64}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))
    assert refused(folder).code == "bundle.unknown-file"


def stored(path: Path, names: list[str], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, "{}")
    return path


@pytest.mark.parametrize("name", ["../bundle.json", "/bundle.json", "a/bundle.json", "a\\b", ".."])
def test_zip_members_have_plain_names(name, tmp_path):
    assert refused(stored(tmp_path / "b.zip", [name])).code == "bundle.unknown-file"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_members_are_stored_once_and_are_files(tmp_path):
    packed = stored(tmp_path / "a.zip", ["bundle.json"], compression=zipfile.ZIP_DEFLATED)
    assert refused(packed).code == "bundle.zip"
    assert refused(stored(tmp_path / "b.zip", ["NOTICE", "NOTICE"])).code == "bundle.zip"
    link = zipfile.ZipInfo("NOTICE")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert refused(tmp_path / "c.zip").code == "bundle.link"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("format_version", "1"),
        ("name", ""),
        ("patch", [16, 16]),
        ("patch", [16, 16, 18]),
        ("patch", [16, 16, True]),
        ("spacing_mm", [2, 2, 2]),
        ("axes", "RAS"),
        ("grid", {"shape": [1, 2, 3]}),
        ("normalisation", "none"),
        ("blend", "sharp"),
        ("mirror_axes", [3]),
        ("modalities", ["T1"]),
        ("modalities", ["T1", "T1", "T2", "FLAIR", "DWI"]),
        ("classes", ["background"]),
        ("training", []),
        ("architecture", {}),
        ("architecture", {"features": "many"}),
        ("files", {"NOTICE": {"bytes": 1}}),
    ],
)
def test_manifest_with_a_wrong_value_is_refused(field, value, folder):
    edit(folder, lambda manifest: manifest.update({field: value}))
    assert refused(folder).code == "bundle.manifest"


def test_manifest_that_is_none_is_refused(folder):
    for text in ("", "[]", "{", '{"format": "mome-bundle"}', "[" * 100_000):
        (folder / "bundle.json").write_text(text)
        assert refused(folder).code == "bundle.manifest"
    (folder / "bundle.json").write_text(" " * (1 << 20) + "{}")
    assert refused(folder).code == "bundle.manifest"


def test_manifest_lists_every_required_member(folder):
    edit(folder, lambda manifest: manifest["files"].pop("NOTICE"))
    assert refused(folder).code == "bundle.unknown-file"
    (folder / "NOTICE").unlink()
    assert refused(folder).code == "bundle.missing-file"


def test_newer_format_asks_for_a_newer_package(folder):
    edit(folder, lambda manifest: manifest.update(format_version=2, news="more"))
    error = refused(folder)
    assert error.code == "bundle.format-version"
    assert "pip install -U" in error.hint


def test_weights_of_another_network_are_refused(folder, tmp_path):
    other = create_bundle(
        tmp_path / "other", TINY, random_tensors(TINY), **{**INFO, "patch": (32, 32, 32)}
    )
    shutil.copy(other.path / "weights.safetensors", folder)
    relist(folder, "weights.safetensors")
    assert refused(folder).code == "bundle.tensors"


def test_damaged_weights_are_refused_even_if_listed(folder):
    (folder / "weights.safetensors").write_bytes(b"\xff" * 1000)
    relist(folder, "weights.safetensors")
    assert refused(folder).code == "bundle.safetensors"


def test_members_of_a_zip_become_files_while_they_are_needed(tiny_bundle, tmp_path):
    zipped = tiny_bundle.save(tmp_path / "tiny.zip")
    with zipped.files("NOTICE") as there:
        assert (there / "NOTICE").read_bytes() == (tiny_bundle.path / "NOTICE").read_bytes()
    assert not there.exists()
    with pytest.raises(BundleError) as caught, zipped.files("other"):
        pass
    assert caught.value.code == "bundle.missing-file"


def test_grid_is_a_grid(tiny_bundle):
    assert isinstance(tiny_bundle.grid, Grid)
    assert tiny_bundle.grid.axes == "RAS"
