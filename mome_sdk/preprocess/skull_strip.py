"""Where the brain is: in the template, in a file of the user's, or as deepbet finds it.

Never from lesion labels: the published preparation added them to its mask, so that its test images
show tissue exactly where the lesions are.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from importlib.util import find_spec

import nibabel as nib
import numpy as np

from mome_sdk.errors import InputError, PreparationError
from mome_sdk.preprocess.intensity import background_of
from mome_sdk.volume import Grid, Volume

INSTALL = 'pip install "mome-sdk[prep]"'
# A mask of the brain that covers less of the scan than this is of another place.
_LEAST_INSIDE = 0.5


def is_installed() -> bool:
    """Whether deepbet is there (the extra `prep`)."""
    return find_spec("deepbet") is not None


def method() -> str:
    """Name and version of the program, for the provenance."""
    return f"deepbet {version('deepbet')}"


def find_brain(scan: Volume) -> Volume:
    """The brain of a whole head as deepbet's networks see it.

    Args:
        scan: The head (I, J, K), any axes, any MR contrast (trained on T1).

    Returns:
        uint8, 1 in the brain, on the scan's grid turned to R, A, S.

    Raises:
        PreparationError: `brain.not-found`, it finds none.
    """
    turned = scan.reorient("RAS")
    image = nib.Nifti1Image(np.ascontiguousarray(turned.array, np.float32), turned.affine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about deepbet's files
        from deepbet import BrainExtraction

        try:
            _, mask, _ = BrainExtraction(no_gpu=True).run(image)
        except AssertionError as error:  # how it says that there is no foreground
            raise PreparationError(
                "brain.not-found",
                f"{method()} finds no brain in the image.",
                hint="Name an MR image of a head, or give a brain mask.",
            ) from error
    return Volume(np.asarray(mask.dataobj, np.uint8), turned.affine)


def check_mask(mask: Volume, scan: Grid) -> Volume:
    """A user's brain mask as uint8: what is not 0 is brain.

    Raises:
        InputError: `argument.brain-mask`, it holds no brain, or most of it is outside the scan.
    """
    brain = Volume((mask.array != 0).astype(np.uint8), mask.affine)
    places = np.argwhere(brain.array)
    if len(places) == 0:
        raise InputError(
            "argument.brain-mask",
            "The brain mask is 0 everywhere.",
            hint="A mask that is not 0 in the brain is expected.",
        )
    index = scan.to_index(brain.grid.to_mm(places[::5]))
    inside = ((index >= -0.5) & (index <= np.array(scan.shape) - 0.5)).all(axis=1).mean()
    if inside < _LEAST_INSIDE:
        raise InputError(
            "argument.brain-mask",
            f"{1 - inside:.0%} of the brain mask are outside the scan.",
            hint="A mask in the scan's own space is expected.",
        )
    return brain


def stripped(scan: Volume, brain: Volume) -> Volume:
    """The scan with its background everywhere but in the brain."""
    inside = brain.resample(scan.grid, mode="nearest").array != 0
    background = scan.array.dtype.type(background_of(scan))
    return Volume(np.where(inside, scan.array, background), scan.affine)
