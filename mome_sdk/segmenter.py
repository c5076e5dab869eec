"""Segmenter: image in, segmentation on the same grid out."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike, NDArray

from mome_sdk import _core
from mome_sdk.engines import Engine, open_engine
from mome_sdk.errors import EngineError, InputError, MomeError, out_of_memory
from mome_sdk.exported import ExportedModel, load_model
from mome_sdk.model import Blend, Model
from mome_sdk.nifti import Source, open_nifti, volume_of
from mome_sdk.preprocess.align import Alignment, align, align_to
from mome_sdk.preprocess.pipeline import SPACES, Prepared, Space, check_image, prepare, restore
from mome_sdk.preprocess.register import METHODS, Method, check_installed
from mome_sdk.segmentation import Segmentation
from mome_sdk.sliding_window import SlidingWindow
from mome_sdk.volume import Volume

Image: TypeAlias = Volume | str | Path | SpatialImage | tuple[ArrayLike, ArrayLike]
Progress: TypeAlias = Callable[[int, int], object]

# Axes (D, H, W) over which windows are mirrored; every combination is averaged, eight with "all".
Mirror: TypeAlias = Literal["none", "all"]
MIRRORS: dict[Mirror, tuple[int, ...]] = {"none": (), "all": (0, 1, 2)}


@dataclass(frozen=True, eq=False)
class CaseResult:
    """What became of one image of a batch.

    Attributes:
        input: The image, as it was given.
        segmentation: What was found in it; None when it could not be used.
        error: Why it could not be used; None when it could.
    """

    input: Image
    segmentation: Segmentation | None
    error: MomeError | None


@dataclass(frozen=True, eq=False)
class _Ready:
    """An image as the network takes it, and what its result will repeat of the image itself."""

    prepared: Prepared
    affine: NDArray[np.float64]
    source: Source | None
    timings: dict[str, float]


class Segmenter:
    """A model, an engine that runs it, and how; segments any number of images.

    Threads may share one Segmenter: nothing in it changes after construction.

    Args:
        model: "demo", the folder or .zip of a bundle, an export folder, or one of these, loaded.
            An export fixes the engines that can run it and the precision.
        engine: "auto" for the fastest engine present, the name of one, or an Engine of your own.
        device: "cpu", or "cuda:0" for an engine that has it.
        precision: "fp32", or another that the engine has; None takes that of the export, or fp32.
        space: Where the images are: "native", as the scanner made them, registered to the
            template here; "mni", in the template's space; both are resampled to the model's grid
            and the result goes back; "model", on the model's own grid already.
        registration: The program that registers native images: "niimath", or "sitk" or "ants" (the
            published preparation's own call) with the extra of that name.
        mirror: "none", or "all" to average over the eight mirrored copies of every window, which
            is the authors' setting and eight times the work.
        step: Distance of windows in parts of the patch, over 0 to 1.
        blend: "exact" or "authors" window weights; None takes what the bundle says.
        batch: Windows per call of the engine, or "auto".
        threads: Most threads to use; None takes MOME_THREADS or all cores.

    Raises:
        BundleError: the model cannot be loaded.
        EngineError: the engine is missing, or lacks the device or the precision.
        InputError: `argument.*`: an option has no such value.

    No option is ever replaced by another one; `Segmentation.provenance` names them all.
    """

    def __init__(
        self,
        model: str | Path | Model = "demo",
        engine: str | Engine = "auto",
        *,
        device: str = "cpu",
        precision: str | None = None,
        space: Space = "native",
        registration: Method = "niimath",
        mirror: Mirror = "none",
        step: float = 0.5,
        blend: Blend | None = None,
        batch: int | Literal["auto"] = "auto",
        threads: int | None = None,
    ) -> None:
        _check_choice("space", space, SPACES)
        _check_choice("mirror", mirror, tuple(MIRRORS))
        _check_choice("registration", registration, METHODS)
        check_installed(registration)
        self.bundle = model if isinstance(model, Model) else load_model(model)
        self.space = space
        self.registration = registration
        self.mirror = mirror
        self.windows = SlidingWindow(
            self.bundle.patch,
            step=step,
            mirror=MIRRORS[mirror],
            blend=blend or self.bundle.blend,
            batch=batch,
            threads=threads,
        )
        self._owns_engine = isinstance(engine, str)
        self.engine = (
            open_engine(self.bundle, engine, device=device, precision=precision, threads=threads)
            if isinstance(engine, str)
            else _matching(engine, device, precision or self.bundle.precision)
        )
        self._open = True

    def align(
        self, volume: Image, *, brain_mask: Image | None = None, force: bool = False
    ) -> Alignment:
        """Where an image lies in the template's space, for `predict(reference=)`.

        Register one image of a session, the best resolved, and predict all others with its
        alignment: they share the scanner's space.

        Args:
            volume: As for `predict`.
            brain_mask, force: As for `predict`.

        Raises:
            PreparationError: `registration.*`, `brain.*`: a check says no.
            InputError, GeometryError: the image cannot be used.
        """
        self._check_native(reference=True)
        return self._align(_opened(volume)[0], brain_mask, force=force)

    def predict(
        self,
        volume: Image,
        progress: Progress | None = None,
        *,
        shares: bool = False,
        reference: Alignment | None = None,
        brain_mask: Image | None = None,
        force: bool = False,
    ) -> Segmentation:
        """Find the lesions of one image.

        Args:
            volume: A Volume, the path of a .nii or .nii.gz file, a nibabel image, or an array
                (I, J, K) with its 4x4 affine to RAS mm. Any axis order; one modality.
            progress: Called with windows done and windows in all, on the thread that called
                `predict`. An exception from it cancels the work and comes back to the caller.
            shares: Also measure each expert's share in the result (`expert_share`).
            reference: What `align` gave for another image of the same session: its registration
                is used, and checked on this image ("native").
            brain_mask: The brain in the image's space, not 0 inside, on any grid ("native").
            force: Go on where a check of the preparation says no; the provenance names it.

        Returns:
            Mask and probability on the image's own grid, with timings (read, register if "native",
            prepare, network, restore; s) and provenance.

        Raises:
            InputError, GeometryError: the image cannot be used; see `read_nifti` and `prepare`.
            PreparationError: `registration.*`, `brain.*`: a check of the preparation says no; its
                `attempt` is the Alignment that was refused.
            EngineError: the engine did not work, or this Segmenter is closed.
        """
        self._check_native(reference=reference, brain_mask=brain_mask, force=force)
        if reference is not None and brain_mask is not None:
            raise InputError(
                "argument.brain-mask",
                "A brain mask was given together with a reference.",
                hint="The brain comes from the reference: give the mask to `align`.",
            )
        ready = self._ready(volume, reference, brain_mask, force=force)
        return self._found(ready, progress, shares=shares)

    def predict_batch(
        self,
        volumes: Iterable[Image],
        *,
        shares: bool = False,
        reference: Alignment | None = None,
        force: bool = False,
    ) -> Generator[CaseResult, None, None]:
        """Find the lesions of many images, one after the other; one bad image stops nothing.

        Args:
            volumes: Images as `predict` takes them. They are taken one at a time, on the caller's
                thread, one ahead of the image whose result is asked for.
            shares, reference, force: As for `predict`.

        Yields:
            A CaseResult for each image, in order, when it is asked for. While the network works on
            one image, the next is read and prepared on one further thread: its timings for these
            stages overlap the other's network. No more than that one image is held ready, so that
            memory does not grow with the number of images.

        A MomeError of an image, or too little memory for it, becomes its `error`. Anything else
        is a defect and comes to the caller. Closing the generator ends the work.
        """
        self._check_native(reference=reference, force=force)
        ready = partial(self._ready, reference=reference, force=force)
        ahead: deque[tuple[Image, Future[_Ready]]] = deque()
        with ThreadPoolExecutor(1, "mome-prepare") as reader:
            for volume in volumes:
                ahead.append((volume, reader.submit(ready, volume)))
                if len(ahead) == 2:
                    yield self._case(*ahead.popleft(), shares=shares)
            while ahead:
                yield self._case(*ahead.popleft(), shares=shares)

    def logits(self, x: ArrayLike, progress: Progress | None = None) -> NDArray[np.float32]:
        """Fused logits of an image that is prepared already.

        Args:
            x: (C, D, H, W) float32, normalised, on the model's grid, axes as the bundle's (SAR).
            progress: As for `predict`.

        Returns:
            (N, D, H, W) float32: windows, mirrored copies and blending as this Segmenter is set.

        Raises:
            InputError: `argument.image`, other axes or channels; `volume.not-finite`.
            EngineError: as `predict`.
        """
        array = np.ascontiguousarray(x, dtype=np.float32)
        channels = self.bundle.architecture.in_channels
        if array.ndim != 4 or array.shape[0] != channels or array.size == 0:
            raise InputError(
                "argument.image",
                f"The array has shape {array.shape}.",
                hint=f"({channels}, D, H, W) is expected.",
            )
        if not np.isfinite(array).all():
            raise InputError(
                "volume.not-finite",
                "The array holds NaN or infinite values.",
                hint="Numbers are expected everywhere.",
            )
        return self._run(array, progress, shares=False)[0]

    def close(self) -> None:
        """Free the engine. Closing twice does nothing; an Engine of your own is left to you."""
        if self._open and self._owns_engine:
            self.engine.close()
        self._open = False

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ready(
        self,
        volume: Image,
        reference: Alignment | None = None,
        brain_mask: Image | None = None,
        *,
        force: bool = False,
    ) -> _Ready:
        """The steps before the network: read, register and prepare."""
        timings: dict[str, float] = {}
        with _timed(timings, "read"):
            image, source = _opened(volume)
        alignment = None
        if self.space == "native":
            with _timed(timings, "register"):
                if reference is None:
                    alignment = self._align(image, brain_mask, force=force)
                else:
                    check_image(image)
                    alignment = align_to(reference, image, self.bundle, force=force)
        with _timed(timings, "prepare"):
            prepared = prepare(image, self.bundle, self.space, alignment=alignment)
        return _Ready(prepared, image.affine, source, timings)

    def _found(self, ready: _Ready, progress: Progress | None, *, shares: bool) -> Segmentation:
        """The network and the way back."""
        prepared, timings = ready.prepared, ready.timings
        with _timed(timings, "network"):
            normalised = np.ascontiguousarray(prepared.volume.array)[np.newaxis]
            logits, raw_shares = self._run(normalised, progress, shares=shares)
        with _timed(timings, "restore"):
            mask, probability = restore(_core.softmax(logits), prepared)
            expert_share = None
            if raw_shares is not None:
                found = _core.argmax(logits) != 0
                expert_share = _mean_shares(
                    raw_shares, {"lesion": found, "brain": prepared.brain}, self.bundle.modalities
                )
        return Segmentation(
            mask=mask,
            affine=ready.affine,
            probability=probability,
            expert_share=expert_share,
            timings=timings,
            provenance=self._provenance(prepared),
            source=ready.source,
        )

    def _case(self, image: Image, ready: Future[_Ready], *, shares: bool) -> CaseResult:
        try:
            return CaseResult(image, self._found(ready.result(), None, shares=shares), None)
        except MomeError as error:
            problem = error
        except MemoryError as error:
            problem = out_of_memory(error)
        finally:
            del ready
        _let_go(problem)
        return CaseResult(image, None, problem)

    def _run(
        self, image: NDArray[np.float32], progress: Progress | None, *, shares: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        if not self._open:
            raise EngineError(
                "engine.closed", "This Segmenter is closed.", hint="Make a new one to go on."
            )
        if shares:
            return self.windows.run_with_shares(self.engine, image, progress=progress)
        return self.windows.run(self.engine, image, progress=progress), None

    def _check_native(self, **options: object) -> None:
        """Refuse what has a use only where images are registered here."""
        for name, value in options.items():
            if value is not None and value is not False and self.space != "native":
                raise InputError(
                    "argument.space",
                    f"{name.replace('_', ' ')} was asked for with space {self.space!r}.",
                    hint="Images are registered, and brains looked for, with space 'native' only.",
                )

    def _align(self, image: Volume, brain_mask: Image | None, *, force: bool) -> Alignment:
        check_image(image)
        brain = None if brain_mask is None else _opened(brain_mask)[0]
        return align(
            image,
            self.bundle,
            brain_mask=brain,
            force=force,
            method=self.registration,
            threads=self.windows.threads,
        )

    def _provenance(self, prepared: Prepared) -> dict[str, Any]:
        """What made the result, as JSON values; no name and no text of the image's header."""
        per_axis = self.windows.starts(prepared.volume.grid.shape)
        return {
            "mome_sdk": version("mome-sdk"),
            "bundle": self.bundle.name,
            "bundle_sha256": self.bundle.sha256,
            "export": _export_of(self.bundle),
            "licence": self.bundle.licence,
            "notice": self.bundle.notice,
            "modalities": list(self.bundle.modalities),
            "classes": list(self.bundle.classes),
            "engine": self.engine.name,
            "device": self.engine.device,
            "precision": self.engine.precision,
            "space": self.space,
            "preparation": prepared.alignment.as_json() if prepared.alignment else None,
            "mirror": self.mirror,
            "step": self.windows.step,
            "blend": self.windows.blend,
            "batch": self.windows.batch,
            "threads": self.windows.threads,
            "patch": list(self.windows.patch),
            "windows": len(per_axis[0]) * len(per_axis[1]) * len(per_axis[2]),
        }


def _opened(image: Image) -> tuple[Volume, Source | None]:
    """The voxels of whatever was given, and the NIfTI header that a mask will repeat."""
    if isinstance(image, Volume):
        return image, None
    if isinstance(image, str | Path):
        opened = open_nifti(image)
        return volume_of(opened), Source(opened.header, Path(image))
    if isinstance(image, nib.Nifti1Image):  # Nifti2Image is one
        return volume_of(image), Source(image.header)
    if isinstance(image, SpatialImage):
        return Volume(np.asarray(image.dataobj), image.affine), None
    if isinstance(image, tuple) and len(image) == 2:
        array, affine = image
        return Volume(np.asarray(array), np.asarray(affine)), None
    raise InputError(
        "argument.image",
        f"The image is a {type(image).__name__}.",
        hint="A Volume, a path, a nibabel image or a pair of array and affine is expected.",
    )


def _mean_shares(
    shares: NDArray[np.float32],
    regions: Mapping[str, NDArray[np.bool_]],
    modalities: tuple[str, ...],
) -> dict[str, dict[str, float | None]]:
    """Mean over each region of the experts' shares (E, D, H, W), made to sum to 1 at every voxel.

    None for a region without voxels. Voxels where no expert says anything are left out.
    """
    total = shares.sum(axis=0)
    result: dict[str, dict[str, float | None]] = {modality: {} for modality in modalities}
    for region, inside in regions.items():
        chosen = inside & (total > 0)
        parts = shares[:, chosen].astype(np.float64) / total[chosen]
        for modality, part in zip(modalities, parts, strict=True):
            result[modality][region] = float(part.mean()) if part.size else None
    return result


def _export_of(model: Model) -> dict[str, str] | None:
    """What was compiled of the bundle, where an export runs."""
    if not isinstance(model, ExportedModel):
        return None
    return {"target": model.target, "experts": model.experts, "sha256": model.export_sha256}


def _matching(engine: Engine, device: str, precision: str) -> Engine:
    """The caller's own engine, if it is what the other arguments say."""
    if (engine.device, engine.precision) != (device, precision):
        raise EngineError(
            "engine.conflict",
            f"The engine runs on {engine.device} in {engine.precision}, the arguments say "
            f"{device} and {precision}.",
            hint="Give the same device and precision.",
        )
    return engine


def _let_go(error: BaseException | None) -> None:
    """Free the arrays in the frames that an error went through: whoever keeps it keeps those."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"argument.{option}",
            f"The {option} is {value!r}.",
            hint=f"It is one of: {', '.join(choices)}.",
        )


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Note the seconds of a stage."""
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
