"""SlidingWindow: run an engine over an image of any size, through the C++ runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mome_sdk import _core

if TYPE_CHECKING:
    from mome_sdk.engines import Engine

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class SlidingWindow:
    """How windows are laid over an image, flipped, batched and blended.

    Attributes:
        patch: Size of a window (D, H, W) in voxels.
        step: Largest distance of two windows, as a fraction of the patch: above 0, at most 1.
        mirror: Axes to flip, of 0 (D), 1 (H) and 2 (W). The logits are the mean over all subsets:
            three axes cost eight times the work.
        blend: "exact" weights windows by a float32 Gaussian, "authors" by the one of the published
            predictor, built in half precision.
        batch: Windows, flips counted, in one call of the engine. "auto" is the engine's own batch
            where that is fixed, else 1: on CPUs larger batches need more memory and save no time.
        threads: Most threads the runner's own work may take; None for all of the process-wide pool.
            The engine has threads of its own.

    Raises:
        InputError: `argument.*`, for a value that cannot be used.
    """

    patch: tuple[int, int, int]
    step: float = 0.5
    mirror: tuple[int, ...] = ()
    blend: Literal["exact", "authors"] = "exact"
    batch: int | Literal["auto"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _core.check_sliding_window(
            patch=self.patch,
            step=self.step,
            mirror=self.mirror,
            blend=self.blend,
            batch=1 if self.batch == "auto" else self.batch,
            threads=self.threads,
        )

    def starts(self, shape: tuple[int, int, int]) -> tuple[list[int], list[int], list[int]]:
        """First voxel of each window along the axes of an image (D, H, W), by nnU-Net's rule.

        An axis shorter than the patch has the one start 0: there the window begins in the zeros
        that are padded before the image.
        """
        return _core.window_starts(shape, self.patch, self.step)

    def memory_bytes(
        self, engine: Engine, shape: tuple[int, int, int], *, shares: bool = False
    ) -> int:
        """Bytes that a run on an image (D, H, W) allocates, its result included.

        The image itself and what the engine allocates are not counted. With an engine on a GPU
        these are bytes of the GPU.
        """
        return _core.sliding_window_bytes(
            shape,
            engine.channels,
            engine.classes,
            engine.experts if shares else 0,
            self.patch,
            self.step,
            self._batch_for(engine),
        )

    def run(
        self, engine: Engine, image: NDArray[np.float32], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Logits of an image.

        Args:
            engine: What computes the logits of a window.
            image: Normalised intensities (C, D, H, W), of any size. Axes shorter than the patch are
                padded with zeros, half of them before the image; the result is cropped again.
            progress: Called as progress(done, total) after each call of the engine, in windows,
                flips counted. What it raises ends the run.

        Returns:
            Logits (N, D, H, W) on the grid of the image, the same for any number of threads, bit by
            bit. They are summed in float32.

        Raises:
            InputError: `argument.*`, or `volume.too-large` if `memory_bytes` are not available.
            EngineError: `engine.not-finite` if the engine returns NaN or infinity or leaves a voxel
                unset; `engine.device` if its GPU is not there or the core was built without CUDA;
                `engine.out-of-memory` if the GPU has no room for the buffers.

        With an engine on "cuda:0" the image is uploaded once, gathered, blended and divided there,
        and the result downloaded once: the same sums in the same order as on the CPU.
        """
        return self._run(engine, image, progress)[0]

    def probabilities(
        self, engine: Engine, image: NDArray[np.float32], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Softmax (N, D, H, W) of the logits, computed where the engine is; else as `run`."""
        return self._run(engine, image, progress, output="probabilities")[0]

    def labels(
        self, engine: Engine, image: NDArray[np.float32], *, progress: Progress | None = None
    ) -> NDArray[np.uint8]:
        """Class of the largest logit (D, H, W), the lowest of equals; else as `run`.

        It is found where the engine is: from a GPU one byte a voxel comes back.
        """
        return self._run(engine, image, progress, output="labels")[0]

    def run_with_shares(
        self, engine: Engine, image: NDArray[np.float32], *, progress: Progress | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits as `run` returns them, and what each expert added to them.

        Returns:
            Logits (N, D, H, W), and shares (E, D, H, W): abs(expert logit x gate) of the class with
            the larger fused logit, averaged over windows and flips with the weights of the logits.
            The shares are not normalised over the experts.

        Raises:
            InputError: As `run` does.
            EngineError: As `run` does, and `engine.shares` if the engine has no experts.
        """
        logits, shares = self._run(engine, image, progress, shares=True)
        assert shares is not None
        return logits, shares

    def _batch_for(self, engine: Engine) -> int:
        return (engine.batch or 1) if self.batch == "auto" else self.batch

    def _run(
        self,
        engine: Engine,
        image: NDArray[np.float32],
        progress: Progress | None,
        *,
        output: Literal["logits", "probabilities", "labels"] = "logits",
        shares: bool = False,
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        return _core.run_sliding_window(
            engine,
            image,
            patch=self.patch,
            step=self.step,
            mirror=self.mirror,
            blend=self.blend,
            batch=self._batch_for(engine),
            threads=self.threads,
            output=output,
            shares=shares,
            progress=progress,
        )
