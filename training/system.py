"""System: what the loop trains and the evaluation runs, MoME and every system beside it alike."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mome_sdk.sliding_window import SlidingWindow

from .batch import Batch, Origin


class System(Protocol):
    """A network with its loss and its way from a whole image to a mask."""

    @property
    def network(self) -> nn.Module:
        """All that is trained and saved."""

    @property
    def needs_at_test(self) -> frozenset[str]:
        """What a prediction must be told besides the image.

        Of "modality", "dataset" and "mask" (of the lesion itself, as clicks are) those that it
        uses.
        """

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """A scalar to minimise; `progress` is epoch / epochs, 0 to 1."""

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of a z-scored image (C, D, H, W).

        Args:
            image: The whole image.
            origin: Read only where `needs_at_test` says so.
            window: Of the sliding window.
            truth: The known mask, for a system that needs clicks, else not read.
        """
