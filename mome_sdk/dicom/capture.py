"""A picture of the result -> secondary capture, with "research use only" burned in."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from highdicom.sc import SCImage
from PIL import Image, ImageDraw, ImageFont

from mome_sdk.dicom.objects import attributes, building, finish, frame_headers, identity
from mome_sdk.dicom.series import Series
from mome_sdk.nifti import NOTICE
from mome_sdk.segmentation import Segmentation

BANNER_PX = 34
_YELLOW = (255, 214, 10)


def make_capture(series: Series, segmentation: Segmentation, png: bytes) -> SCImage:
    """A secondary capture image for viewers that show neither SEG nor SR.

    Args:
        series: The series whose volume was segmented.
        segmentation: What was found.
        png: A picture of it, such as `mome_sdk.report.picture` draws; no text that names a patient
            may be in it, since the object says that there is none.

    Returns:
        RGB, Explicit VR Little Endian: the notice on a band of BANNER_PX rows, the picture below.

    Raises:
        DicomError: `dicom.build`, the headers of the series do not allow it.
    """
    same = identity(series, segmentation)
    with building("secondary capture"):
        made = SCImage.from_ref_dataset(
            ref_dataset=frame_headers(series)[0],
            pixel_array=_with_banner(png),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            **_attributes(series, segmentation),
        )
        made.PatientOrientation = []  # three planes at once have none
        made.BurnedInAnnotation = "NO"  # PS3.3 C.7.6.1.1.4: nothing that identifies the patient
        made.ImageComments = NOTICE
        finish(made, series, same)
    return made


def _attributes(series: Series, segmentation: Segmentation) -> dict[str, Any]:
    return attributes(
        series, segmentation, kind="SC", position=93, description="MoME lesion preview"
    )


def _with_banner(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The picture (rows, columns, 3) under a band with the notice."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    canvas = Image.new("RGB", (picture.width, picture.height + BANNER_PX))
    canvas.paste(picture, (0, BANNER_PX))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, picture.width - 1, BANNER_PX - 1), (40, 34, 0), _YELLOW)
    place = (picture.width // 2, BANNER_PX // 2)
    draw.text(place, NOTICE.upper(), _YELLOW, ImageFont.load_default(18), anchor="mm")
    return np.asarray(canvas)
