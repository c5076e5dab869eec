"""Secondary capture: the picture under the notice, and nothing that is burned in of the patient."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mome_sdk.dicom.capture import BANNER_PX, make_capture
from mome_sdk.dicom.objects import encoded
from mome_sdk.report import picture
from mome_sdk.study import Chosen

from .conftest import bright


def test_a_preview_has_the_notice_above_the_picture(
    chosen: Chosen, tmp_path: Path, dciodvfy: Callable[[Path], list[str]]
) -> None:
    result = bright(chosen.volume)
    png = picture(chosen.volume, result)
    made = make_capture(chosen.series, result, png)
    pixels = made.pixel_array
    drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    np.testing.assert_array_equal(pixels[BANNER_PX:], drawn)
    band = pixels[2 : BANNER_PX - 2, 2:-2].astype(int)
    yellow = (band[..., 0] > 200) & (band[..., 1] > 160) & (band[..., 2] < 90)
    # Letters: some of the band, over a good part of its width.
    assert 0.01 < yellow.mean() < 0.3
    assert np.ptp(np.flatnonzero(yellow.any(axis=0))) > 300
    assert made.BurnedInAnnotation == "NO"
    assert made.ImageComments == "Research use only, not a medical device"
    (tmp_path / "sc.dcm").write_bytes(encoded(made))
    assert dciodvfy(tmp_path / "sc.dcm") == []


def test_the_same_again_is_the_same_to_the_byte(chosen: Chosen) -> None:
    result = bright(chosen.volume)
    png = picture(chosen.volume, result)
    first, second = (encoded(make_capture(chosen.series, result, png)) for _ in range(2))
    assert first == second
