"""Brain lesion masks from one MR image of any modality. Research use only, not a medical device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mome_sdk.bundle import ModelBundle
    from mome_sdk.engines import open_engine
    from mome_sdk.errors import MomeError
    from mome_sdk.nifti import read_nifti, write_nifti
    from mome_sdk.segmentation import Lesion, Segmentation
    from mome_sdk.segmenter import CaseResult, Segmenter
    from mome_sdk.sliding_window import SlidingWindow
    from mome_sdk.volume import Grid, Volume

# Where each public name lives; loaded when it is first used, so that importing costs nothing.
_HOMES = {
    "CaseResult": "segmenter",
    "Grid": "volume",
    "Lesion": "segmentation",
    "ModelBundle": "bundle",
    "MomeError": "errors",
    "Segmentation": "segmentation",
    "Segmenter": "segmenter",
    "SlidingWindow": "sliding_window",
    "Volume": "volume",
    "open_engine": "engines",
    "read_nifti": "nifti",
    "write_nifti": "nifti",
}

__all__ = [
    "CaseResult",
    "Grid",
    "Lesion",
    "ModelBundle",
    "MomeError",
    "Segmentation",
    "Segmenter",
    "SlidingWindow",
    "Volume",
    "open_engine",
    "read_nifti",
    "write_nifti",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
