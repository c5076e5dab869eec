"""A trained system on every test case of the benchmark: rows of results, and what figures need.

MoME and plain U-Nets run on the engine that `mome predict` would take, from a bundle of their
weights; the others in PyTorch. Windows, step and blending are the same for all.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from mome_sdk.architecture import Architecture
from mome_sdk.bundle import MODALITIES, ModelBundle, create_bundle
from mome_sdk.engines import Engine, open_engine
from mome_sdk.errors import InputError
from mome_sdk.files import write_file
from mome_sdk.network import MoME
from mome_sdk.sliding_window import SlidingWindow

from .batch import Origin
from .comparators.nnunet import NnUNet
from .comparators.sam_med3d import SamMed3D
from .config import Index3
from .dataset import Case, Scan, read_case
from .metrics import dice
from .mome import Mome
from .results import Result, append_row, done, read_rows, score, slug
from .system import System

Byte = NDArray[np.uint8]
Float = NDArray[np.float32]


class Found(NamedTuple):
    """mask (D, H, W); of a MoME, shares (E, D, H, W) of the experts; the mask after each click."""

    mask: Byte
    shares: Float | None = None
    clicks: tuple[Byte, ...] = ()


Segment = Callable[[Case, Origin], Found]


def assess(
    name: str,
    seed: int,
    systems: dict[str, System],
    choose: Callable[[Scan], str | None],
    scans: Sequence[Scan],
    *,
    seen: Callable[[Scan], bool],
    patch: Index3,
    folder: Path,
    scratch: Path,
) -> None:
    """Add a row to results.csv for each scan that has none yet.

    Args:
        name, seed: Of the system.
        systems: One, or several by name.
        choose: Name of the system for a scan; None where none can segment it.
        scans: Test cases.
        seen: Whether a scan's data set was trained on.
        patch: Window.
        folder: Of results.csv; shares.csv, clicks.csv, features/ and maps/ beside it.
        scratch: A folder for bundles of the weights.
    """
    path = folder / "results.csv"
    there = done(read_rows(path, Result), name, seed)
    window = SlidingWindow(patch, threads=1)
    segments: dict[str, Segment] = {}
    for scan in tqdm(scans, desc=f"{name}, seed {seed}", unit="case", disable=None):
        key = choose(scan)
        if key is None or scan.name in there:
            continue
        if key not in segments:
            segments[key] = _segment(systems[key], window, scratch / f"{seed}-{key or name}")
        case = read_case(scan)
        started = time.monotonic()
        found = segments[key](case, scan.origin)
        seconds = time.monotonic() - started
        group = "seen" if seen(scan) else "unseen"
        if found.shares is not None:
            _write_shares(folder, name, seed, scan, case, found.shares)
        if found.clicks:
            _write_clicks(folder, name, seed, scan, case, found.clicks)
        row = score(
            (name, seed),
            scan,
            group,
            found.mask,
            case.lesion,
            spacing_mm=case.spacing_mm,
            seconds=seconds,
        )
        append_row(path, row)


def _segment(system: System, window: SlidingWindow, scratch: Path) -> Segment:
    if isinstance(system, Mome):
        engine = _engine(system.network, system.network.arch, window.patch, scratch)

        def with_shares(case: Case, _: Origin) -> Found:
            logits, shares = window.run_with_shares(engine, case.image[np.newaxis])
            return Found(logits.argmax(axis=0).astype(np.uint8), shares)

        return with_shares
    if isinstance(system, NnUNet):
        engine = _engine(system.network, system.arch, window.patch, scratch)
        return lambda case, _: Found(window.labels(engine, case.image[np.newaxis]))

    if isinstance(system, SamMed3D):

        def clicked(case: Case, _: Origin) -> Found:
            image = np.ascontiguousarray(case.image[np.newaxis])
            masks = tuple(system.click_masks(image, case.lesion))
            return Found(masks[-1], clicks=masks)

        return clicked

    def plain(case: Case, origin: Origin) -> Found:
        image = np.ascontiguousarray(case.image[np.newaxis])
        return Found(system.segment(image, origin, window))

    return plain


def _engine(network: nn.Module, arch: Architecture, patch: Index3, scratch: Path) -> Engine:
    """The fastest engine on a bundle of a MoME's or a U-Net's weights."""
    return open_engine(bundle_of(network, arch, patch, scratch), threads=1)


def bundle_of(network: nn.Module, arch: Architecture, patch: Index3, path: Path) -> ModelBundle:
    """A bundle of a MoME, or of a U-Net as a MoME of one expert, at a path that is made anew."""
    if path.exists():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().numpy() for k, v in network.state_dict().items()}
    if not isinstance(network, MoME):
        tensors = {f"experts.0.{name}": value for name, value in tensors.items()}
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return create_bundle(
        path,
        arch,
        tensors,
        name="benchmark",
        patch=patch,
        blend="exact",
        training={"source": "synthetic benchmark"},
        modalities=MODALITIES if isinstance(network, MoME) else ("any",),
    )


# ---- what figures need


def _write_shares(
    folder: Path, name: str, seed: int, scan: Scan, case: Case, shares: Float
) -> None:
    """shares.csv: each expert's part in the fused logits, averaged over the head, summing to 1.

    maps/: of the first subject, in one seed of a system, the same voxel by voxel on one slice.
    """
    head = case.image > case.image.min() + 0.1
    means = shares[:, head].mean(axis=1)
    means = means / means.sum()
    path = folder / "shares.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            experts = [f"expert {modality}" for modality in MODALITIES]
            writer.writerow(["system", "seed", "case", "modality", "lesion_type", *experts])
        said = [name, seed, scan.name, scan.modality, scan.lesion_type]
        writer.writerow([*said, *(f"{share:.5f}" for share in means)])
    _write_map(folder, name, seed, scan, case, shares)


def _write_map(folder: Path, name: str, seed: int, scan: Scan, case: Case, shares: Float) -> None:
    path = folder / "maps" / f"{slug(name)}-{seed}.npz"
    if any(other != path for other in path.parent.glob(f"{slug(name)}-[0-9]*.npz")):
        return  # another seed's are there
    kept = dict(np.load(path)) if path.exists() else {}
    subject = str(kept.get("subject", f"{scan.dataset} {scan.subject}"))
    if subject != f"{scan.dataset} {scan.subject}":
        return
    path.parent.mkdir(exist_ok=True)
    level = int(case.lesion.sum(axis=(1, 2)).argmax())
    kept |= {
        "subject": np.array(subject),
        f"image {scan.modality}": case.image[level].astype(np.float16),
        f"shares {scan.modality}": shares[:, level].astype(np.float16),
        "lesion": case.lesion[level],
    }
    data = io.BytesIO()
    np.savez_compressed(data, **kept)
    write_file(path, data.getvalue())


def _write_clicks(
    folder: Path, name: str, seed: int, scan: Scan, case: Case, masks: Sequence[Byte]
) -> None:
    """clicks.csv: the Dice after each click."""
    path = folder / "clicks.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["system", "seed", "case", "click", "dice"])
        for click, mask in enumerate(masks, start=1):
            writer.writerow([name, seed, scan.name, click, f"{dice(mask, case.lesion):.5f}"])


@torch.inference_mode()
def write_features(
    network: nn.Module, name: str, seed: int, scans: Sequence[Scan], folder: Path
) -> None:
    """features/<system>-<seed>.npz: the bottleneck of every scan, averaged over the whole head.

    Of a MoME it is the gate's. The image is computed whole, without windows, its edges padded to
    what the strides divide. Arrays: vectors (n, channels), and case, modality, lesion_type, group.
    """
    path = folder / "features" / f"{slug(name)}-{seed}.npz"
    if path.exists():
        return
    if not hasattr(network, "encoder") and not isinstance(network, MoME):
        raise InputError("argument.system", f"{name} has no bottleneck.", hint="Name a U-Net.")
    vectors = []
    for scan in tqdm(scans, desc=f"{name}, bottleneck", unit="case", disable=None):
        image = torch.from_numpy(read_case(scan).image.copy())[None, None]
        vectors.append(_bottleneck(network, _padded(image)).mean(dim=(2, 3, 4))[0].numpy())
    data = io.BytesIO()
    np.savez_compressed(
        data,
        vectors=np.stack(vectors).astype(np.float32),
        case=np.array([scan.name for scan in scans]),
        modality=np.array([scan.modality for scan in scans]),
        lesion_type=np.array([scan.lesion_type for scan in scans]),
        dataset=np.array([scan.dataset for scan in scans]),
    )
    path.parent.mkdir(exist_ok=True)
    write_file(path, data.getvalue())


def _bottleneck(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    if isinstance(network, MoME):
        stems = [expert.get_submodule("encoder.stages.0")(image) for expert in network.experts]
        features: torch.Tensor = network.gate.encoder(torch.cat((image, *stems), dim=1))[-1]
        return features
    encoder = network.get_submodule("encoder")
    last: torch.Tensor = encoder(image)[-1]
    return last


def _padded(image: torch.Tensor, multiple: int = 32) -> torch.Tensor:
    pads = [p for edge in image.shape[:1:-1] for p in (0, -edge % multiple)]
    return nn.functional.pad(image, pads, value=float(image.min()))
