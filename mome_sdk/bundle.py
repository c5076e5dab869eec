"""ModelBundle: all that must match the weights, in one folder or zip; load, verify, save.

Members: bundle.json (the manifest), weights.safetensors, template.nii.gz, brain_mask.nii.gz, NOTICE
and, for engines other than torch, model.onnx, whose initializers point into weights.safetensors.
`schemas/bundle.schema.json` describes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.architecture import Architecture
from mome_sdk.container import (
    ALIGNMENT,
    Member,
    check_files,
    listed,
    manifest_text,
    members_of,
    published,
)
from mome_sdk.errors import BundleError
from mome_sdk.manifest import FORMAT, FORMAT_VERSION, MANIFEST, checked_manifest
from mome_sdk.model import BRAIN_MASK, NOTICE_FILE, TEMPLATE, Blend, Model
from mome_sdk.nifti import NOTICE

WEIGHTS, GRAPH = "weights.safetensors", "model.onnx"
MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "DWI")  # experts 1..5 of the published set
CLASSES = ("background", "lesion")

_DATA = Path(__file__).resolve().parent / "data"
EXAMPLE = _DATA / "example"  # flair.nii.gz, generated, and its lesion.nii.gz
_REQUIRED = {WEIGHTS, TEMPLATE, BRAIN_MASK, NOTICE_FILE}
_PADDING = "padding."
# The published crop [20:180, 20:216, 0:160] of the template, with the affine moved along.
_MODEL_GRID = {
    "shape": [160, 196, 160],
    "affine": [[1, 0, 0, -78], [0, 1, 0, -114], [0, 0, 1, -72], [0, 0, 0, 1]],
}
_INTENDED_USE = f"Lesions in one brain MR image registered to MNI152, for research. {NOTICE}."

GraphWriter: TypeAlias = Callable[[Path, Architecture, Path], None]


@dataclass(frozen=True, eq=False)
class ModelBundle(Model):
    """A model with its weights, known to be whole.

    Attributes:
        tensors: Name (`experts.{0..}.` or `gate.` + published name) -> float32, read-only, as views
            of mapped memory; shapes as `architecture.tensor_shapes()`.
    """

    tensors: Mapping[str, NDArray[np.float32]]

    @classmethod
    def load(cls, path: str | Path) -> ModelBundle:
        """Open a bundle and check every byte of it.

        Args:
            path: A folder, a zip with stored (uncompressed) members, or "demo".

        Raises:
            BundleError: `bundle.not-found`, `bundle.not-a-bundle`, `bundle.unreadable`;
                `bundle.zip`, `bundle.link`, `bundle.unknown-file`, `bundle.missing-file`: the
                container is not as it should be; `bundle.manifest`, `bundle.format-version`;
                `bundle.size`, `bundle.sha256`: a member was altered; `bundle.safetensors`,
                `bundle.tensors`: the weights do not fit the architecture.
        """
        path = bundle_path(path)
        members = members_of(path)
        text = manifest_text(members, MANIFEST)
        manifest, architecture = checked_manifest(text)
        check_files(members, manifest["files"], MANIFEST, required=_REQUIRED, optional={GRAPH})
        tensors = _checked_tensors(members[WEIGHTS], manifest, architecture)
        sha256 = hashlib.sha256(text).hexdigest()
        return cls(path, manifest, sha256, architecture, members, tensors)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """bundle.json."""
        return self.description

    @property
    def weights(self) -> Member:
        """Where the bytes of the weights lie: a file, or a part of a zip."""
        return self._members[WEIGHTS]

    def save(self, path: str | Path) -> ModelBundle:
        """Copy the bundle, byte for byte, to a new folder or .zip; it is there whole or not at all.

        Raises:
            InputError: `argument.output`, `path` exists or cannot be written;
                `argument.output-folder`, its folder does not exist.
        """
        with published(Path(path)) as folder:
            for name, member in self._members.items():
                with (folder / name).open("wb") as file:
                    file.writelines(member.chunks())
        return ModelBundle.load(path)


def bundle_path(path: str | Path) -> Path:
    """Where a bundle is that may be called "demo"."""
    return _DATA / "demo" if str(path) == "demo" else Path(path).resolve()


def create_bundle(
    path: str | Path,
    architecture: Architecture,
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    name: str,
    patch: Sequence[int],
    blend: Blend,
    training: Mapping[str, Any],
    modalities: Sequence[str] = MODALITIES,
    classes: Sequence[str] = CLASSES,
    mirror_axes: Sequence[int] = (0, 1, 2),
    licence: str = "not stated",
    notice: str = NOTICE,
    graph: GraphWriter | None = None,
) -> ModelBundle:
    """Write a new bundle, whole or not at all, and load it.

    Args:
        path: A folder or .zip that does not exist yet.
        architecture: Sizes of the network.
        tensors: Exactly `architecture.tensor_shapes()`, float32.
        name: What the model is called.
        patch: Window (D, H, W) in voxels.
        blend: Window weights to run it with.
        training: Where the weights come from; any JSON values.
        modalities: One per expert.
        classes: One per logit, the background first.
        mirror_axes: Axes of (D, H, W) that training mirrored.
        licence: Terms of the weights.
        notice: What must be said with every result.
        graph: Writes model.onnx (`mome_sdk.export.graph.write_graph`); without it the bundle runs
            with the torch engine only.

    Raises:
        BundleError: `bundle.tensors`, `bundle.manifest`: the parts do not fit together.
        InputError: as for `ModelBundle.save`.
    """
    check_tensors(tensors, architecture)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "intended_use": _INTENDED_USE,
        "notice": notice,
        "licence": licence,
        "architecture": asdict(architecture),
        "patch": list(patch),
        "spacing_mm": [1.0, 1.0, 1.0],
        "axes": "SAR",
        "grid": _MODEL_GRID,
        "normalisation": "z-score",
        "blend": blend,
        "mirror_axes": list(mirror_axes),
        "modalities": list(modalities),
        "classes": list(classes),
        "training": dict(training),
    }
    with published(Path(path)) as folder:
        _write_weights(folder / WEIGHTS, tensors, _weights_metadata(manifest))
        if graph is not None:
            graph(folder / GRAPH, architecture, folder / WEIGHTS)
        for member in (TEMPLATE, BRAIN_MASK, NOTICE_FILE):
            shutil.copyfile(_DATA / "template" / member, folder / member)
        manifest["files"] = listed(folder)
        text = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()
        checked_manifest(text)
        (folder / MANIFEST).write_bytes(text)
    return ModelBundle.load(path)


def check_tensors(tensors: Mapping[str, NDArray[Any]], architecture: Architecture) -> None:
    """Compare names, shapes and types of weights with what the architecture needs.

    Raises:
        BundleError: `bundle.tensors`: one is missing, unknown, of another shape or not float32.
    """
    expected = architecture.tensor_shapes()
    if missing := sorted(expected.keys() - tensors.keys()):
        _reject_tensors(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - expected.keys()):
        _reject_tensors(f"{len(extra)} tensors are not the network's, the first is {extra[0]}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            _reject_tensors(f"{name} has shape {tensors[name].shape}, {shape} is expected")
        if tensors[name].dtype != np.float32:
            _reject_tensors(f"{name} is {tensors[name].dtype}, float32 is expected")


def tensor_places(weights: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of every tensor in a safetensors file that was checked before."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        places[name] = (8 + length + begin, end - begin)
    return places


def _write_weights(
    path: Path, tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]
) -> None:
    """A safetensors file whose tensors each begin at a multiple of 64 bytes of the file.

    The format allows no gaps, so that they are tensors too, of bytes, named `padding.*`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (begin, end)}
        if gap := -end % ALIGNMENT:
            begin, end = end, end + gap
            entry = {"dtype": "U8", "shape": (gap,), "data_offsets": (begin, end)}
            header[f"{_PADDING}{name}"] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").data)
            file.write(bytes(-tensor.nbytes % ALIGNMENT))


def _weights_metadata(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The numbers that an engine needs, for one that reads the weights alone."""
    numbers = {key: json.dumps(manifest[key]) for key in ("architecture", "patch")}
    return {"format": f"{FORMAT}-{FORMAT_VERSION}", **numbers}


def _checked_tensors(
    member: Member, manifest: Mapping[str, Any], architecture: Architecture
) -> dict[str, NDArray[np.float32]]:
    """Views of the weights; copies where a foreign zip put them at odd addresses."""
    stored, metadata = _core.read_safetensors(member.path, offset=member.offset, size=member.size)
    if metadata != _weights_metadata(manifest):
        _reject_tensors("the numbers in the weights' metadata are not those of the manifest")
    tensors = {
        name: np.require(tensor, requirements="A")
        for name, tensor in stored.items()
        if not name.startswith(_PADDING)
    }
    check_tensors(tensors, architecture)
    return {name: tensors[name] for name in architecture.tensor_shapes()}


def _reject_tensors(found: str) -> None:
    raise BundleError(
        "bundle.tensors",
        f"The weights do not fit the architecture: {found}.",
        hint="The files belong to another network: import the right ones.",
    )
