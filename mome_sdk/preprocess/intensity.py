"""Intensities as the network expects them: z-score over the whole volume, background included."""

from __future__ import annotations

import numpy as np

from mome_sdk import _core
from mome_sdk.errors import InputError
from mome_sdk.volume import Volume


def check_intensities(volume: Volume) -> None:
    """Refuse an image whose voxels are not all finite or hold one value only.

    Raises:
        InputError: `volume.not-finite`, `volume.constant`.
    """
    finite = np.isfinite(volume.array)
    if not finite.all():
        missing = volume.array.size - int(np.count_nonzero(finite))
        raise InputError(
            "volume.not-finite",
            f"{missing} of {volume.array.size} voxels are NaN or infinite.",
            hint="Numbers are expected everywhere: convert the scan again, or set what they are.",
        )
    first = volume.array.flat[0]
    if (volume.array == first).all():
        raise InputError(
            "volume.constant",
            f"All {volume.array.size} voxels hold the value {first:g}.",
            hint="There is nothing to see in this image: name the scan itself.",
        )


def normalise(volume: Volume) -> Volume:
    """The volume with mean 0 and standard deviation 1 over all its voxels, float32.

    Mean and population deviation are taken over the whole array, background included, as the
    published network was trained (nnU-Net's ZScoreNormalization without a mask). A z-score of the
    brain alone is another input.
    """
    return Volume(_core.zscore(np.ascontiguousarray(volume.array, np.float32)), volume.affine)


def background_of(volume: Volume) -> float:
    """The value of the air around the head, from the six faces of the box.

    That is the most frequent value there; where none makes up a tenth of them (the air of a whole
    head is noise), the median. Not the corners: real files hold interpolation artefacts there.
    """
    array = volume.array
    faces = np.concatenate(
        [f.ravel() for f in (array[[0, -1]], array[:, [0, -1]], array[:, :, [0, -1]])]
    )
    values, counts = np.unique(faces, return_counts=True)
    if counts.max() < 0.1 * faces.size:
        return float(np.median(faces))
    return float(values[counts.argmax()])


def head_of(volume: Volume) -> Volume:
    """1 where the head is, else 0 (uint8): what differs clearly from the background.

    Clearly is a tenth of what the brightest hundredth of the image differs by: more than the noise
    of air. Good enough to see where a head is; no brain mask.
    """
    contrast = np.abs(volume.array - np.float32(background_of(volume)))
    different = contrast[contrast > 0]
    limit = 0.1 * np.percentile(different[:: max(1, different.size // 200_000)], 99)
    return Volume(contrast > limit, volume.affine)
