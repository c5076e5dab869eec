"""ExportedModel: an export folder, one file compiled from a bundle and all that running it needs.

Members: export.json (the manifest), the artefact of the target, reference.safetensors (windows and
what the network gives for them in float32, for parity), and from the bundle bundle.json,
template.nii.gz, brain_mask.nii.gz and NOTICE. `schemas/export.schema.json` describes the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle, bundle_path
from mome_sdk.container import check_files, manifest_text, members_of
from mome_sdk.errors import BundleError
from mome_sdk.manifest import (
    MANIFEST,
    Fields,
    bad_manifest,
    checked_fields,
    checked_manifest,
    is_count,
    is_files,
    is_list,
    is_number,
    is_text,
)
from mome_sdk.model import BRAIN_MASK, NOTICE_FILE, TEMPLATE, Model

FORMAT = "mome-export"
FORMAT_VERSION = 1
EXPORT, REFERENCE = "export.json", "reference.safetensors"
FROM_BUNDLE = (MANIFEST, TEMPLATE, BRAIN_MASK, NOTICE_FILE)
# Target -> its files; the first is what an engine opens.
ARTEFACTS = {
    "onnx": ("model.onnx", "model.onnx.data"),
    "tensorrt": ("model.plan",),
    "tensorrt-rtx": ("model.plan",),
    "torch-tensorrt": ("model.pt2",),
    "torchscript": ("model.ts",),
    "aoti": ("model.pt2",),
}
PRECISIONS = ("fp32", "fp16")
EXPERTS = ("grouped", "separate")
NOT_RUN = "not run here"

_COPIED = ("patch", "axes", "modalities", "classes")  # fields that repeat the bundle's
_PARITY = {"max_of_range": is_number, "rms": is_number, "against": is_text, "where": is_text} | {
    name: lambda v: type(v) is int and v >= 0 for name in ("flips", "voxels")
}


def _is_parity(value: Any) -> bool:
    return value == NOT_RUN or (
        isinstance(value, dict)
        and value.keys() == _PARITY.keys()
        and all(check(value[name]) for name, check in _PARITY.items())
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_text, [*value.keys(), *value.values()]))


_FIELDS: Fields = {
    "target": (lambda v: v in ARTEFACTS, f"One of {', '.join(ARTEFACTS)}"),
    "precision": (lambda v: v in PRECISIONS, '"fp32" or "fp16"'),
    "experts": (lambda v: v in EXPERTS, '"grouped" or "separate"'),
    "batch": (lambda v: v is None or is_count(v), "A positive whole number, or null"),
    "patch": (lambda v: is_list(v, is_count, 3), "Three positive whole numbers"),
    "axes": (lambda v: v == "SAR", '"SAR"'),
    "modalities": (lambda v: is_list(v, is_text), "A list of different names"),
    "classes": (lambda v: is_list(v, is_text), "A list of different names"),
    "bundle": (
        lambda v: _is_texts(v) and v.keys() == {"name", "sha256"},
        "An object with name and sha256",
    ),
    "fp32_tensors": (lambda v: is_list(v, is_text), "A list of different names"),
    "parity": (_is_parity, f'An object with {", ".join(_PARITY)}, or "{NOT_RUN}"'),
    "versions": (_is_texts, "An object of texts"),
    "details": (lambda v: isinstance(v, dict), "An object"),
    "files": (is_files, "An object of file names with bytes and sha256"),
}


@dataclass(frozen=True, eq=False)
class ExportedModel(Model):
    """A network compiled for an engine, known to be whole; `description` is that of its bundle.

    Attributes:
        manifest: export.json.
        export_sha256: Of export.json, which holds the sha256 of every other file.
    """

    manifest: Mapping[str, Any]
    export_sha256: str

    @classmethod
    def load(cls, path: str | Path) -> ExportedModel:
        """Open an export folder and check every byte of it. What it holds is not run or loaded.

        Raises:
            BundleError: `bundle.not-found`, `bundle.not-a-bundle`, `bundle.unreadable`,
                `bundle.link`, `bundle.unknown-file`, `bundle.missing-file`: the folder is not as it
                should be; `bundle.manifest`, `bundle.format-version`; `bundle.size`,
                `bundle.sha256`: a file was altered; `bundle.other`: the parts come from different
                bundles.
        """
        path = Path(path).resolve()
        if path.is_file():
            raise BundleError(
                "bundle.not-a-bundle", f"{path} is a file.", hint="Give the folder of an export."
            )
        members = members_of(path)
        text = manifest_text(members, EXPORT)
        manifest = checked_fields(text, EXPORT, FORMAT, FORMAT_VERSION, _FIELDS)
        required = (*FROM_BUNDLE, REFERENCE, *ARTEFACTS[manifest["target"]])
        check_files(members, manifest["files"], EXPORT, required=required)
        described = manifest_text(members, MANIFEST)
        description, architecture = checked_manifest(described)
        sha256 = hashlib.sha256(described).hexdigest()
        _check_same_bundle(manifest, description, sha256)
        return cls(
            path,
            description,
            sha256,
            architecture,
            members,
            manifest,
            hashlib.sha256(text).hexdigest(),
        )

    @property
    def kind(self) -> str:
        """The target: a key of ARTEFACTS."""
        return self.target

    @property
    def target(self) -> str:
        """What the bundle was compiled for: a key of ARTEFACTS."""
        return str(self.manifest["target"])

    @property
    def precision(self) -> str:
        """What the file computes in, but for `fp32_tensors`, norm statistics and fusion."""
        return str(self.manifest["precision"])

    @property
    def experts(self) -> str:
        """ "grouped", one network of grouped convolutions; or "separate", one after the other."""
        return str(self.manifest["experts"])

    @property
    def batch(self) -> int | None:
        """Windows that every call must have; None for any number."""
        batch: int | None = self.manifest["batch"]
        return batch

    @property
    def file(self) -> Path:
        """The artefact, as an engine opens it."""
        return self.path / ARTEFACTS[self.target][0]

    @property
    def details(self) -> Mapping[str, Any]:
        """What the target has to say: versions, devices and settings that its engine compares."""
        details: Mapping[str, Any] = self.manifest["details"]
        return details

    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
        """Windows (B, C, D, H, W), logits (B, N, D, H, W) for them, and what computed these.

        Raises:
            BundleError: `bundle.tensors`, `bundle.safetensors`: the file holds something else.
        """
        tensors, metadata = _core.read_safetensors(self._members[REFERENCE].path)
        sizes = self.architecture
        channels = {"image": sizes.in_channels, "logits": sizes.classes}
        for name, count in channels.items():
            shape = (count, *self.patch)
            found = tensors.get(name)
            if found is None or found.dtype != np.float32 or found.shape[1:] != shape:
                raise BundleError(
                    "bundle.tensors",
                    f"{REFERENCE} holds no {name} of shape (B, {', '.join(map(str, shape))}).",
                    hint="Export the bundle again.",
                )
        return tensors["image"], tensors["logits"], metadata.get("against", "not stated")


def load_model(path: str | Path) -> Model:
    """The bundle or the export that lies at a path.

    Args:
        path: "demo", the folder or .zip of a bundle, or an export folder.

    Raises:
        BundleError: as `ModelBundle.load` and `ExportedModel.load`.
    """
    if (bundle_path(path) / EXPORT).is_file():
        return ExportedModel.load(path)
    return ModelBundle.load(path)


def parity_line(parity: Mapping[str, Any] | str) -> str:
    """The parity of a manifest as a person reads it."""
    if isinstance(parity, str):
        return f"{parity}: `mome export --check` measures it where the file runs"
    return (
        f"{parity['max_of_range']:.1e} of the logits' range at most, rms {parity['rms']:.1e}; "
        f"{parity['flips']:,} of {parity['voxels']:,} voxels get another class; "
        f"against {parity['against']}, by {parity['where']}"
    )


def _check_same_bundle(
    manifest: Mapping[str, Any], description: Mapping[str, Any], sha256: str
) -> None:
    """Refuse parts of different bundles in one folder."""
    for field in _COPIED:
        if manifest[field] != description[field]:
            raise bad_manifest(
                f"{field} in {EXPORT} is {str(manifest[field])[:100]}",
                f"{str(description[field])[:100]}, as in {MANIFEST},",
            )
    described = {name: description["files"].get(name) for name in FROM_BUNDLE[1:]}
    copied = {name: manifest["files"][name] for name in FROM_BUNDLE[1:]}
    if manifest["bundle"] != {"name": description["name"], "sha256": sha256} or described != copied:
        raise BundleError(
            "bundle.other",
            f"{EXPORT} is of another bundle than {MANIFEST} or the files that it lists.",
            hint="Export the bundle again.",
        )
