"""A node whose model calls bright voxels lesion: for tests, and as a program that is killed.

`python -m pacs.node CONFIG.toml [SECONDS]` runs one; each segmentation takes so long.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mome_sdk.segmentation import Segmentation
from mome_sdk.volume import Volume

PROVENANCE = {
    **{"mome_sdk": "0.1.0", "bundle": "test", "bundle_sha256": "ab" * 32, "engine": "bright"},
    **{"classes": ["background", "lesion"], "space": "native", "precision": "fp32"},
}


class BrightSegmenter:
    """What is brighter than any tissue of the phantom."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def predict(self, volume: Volume, **_: Any) -> Segmentation:
        """The mask on the volume's grid."""
        time.sleep(self._seconds)
        mask = (volume.array > 250).astype(np.uint8)
        return Segmentation(mask, volume.affine, provenance=PROVENANCE)


def main() -> None:
    """Run until a signal."""
    from mome_sdk.pacs.service import Service
    from mome_sdk.pacs.settings import load_service_config

    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    config = load_service_config(Path(sys.argv[1]))
    Service(config, segmenter=lambda: BrightSegmenter(seconds)).run()  # type: ignore[arg-type,return-value]


if __name__ == "__main__":
    main()
