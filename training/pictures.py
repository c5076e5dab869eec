"""Contact sheets of the synthetic benchmark: a page for each lesion type."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mome_sdk.files import make_folders, write_file
from mome_sdk.nifti import read_nifti

from .dataset import Scan

SUBJECTS = 3  # of each data set and type
HEIGHT = 196  # of a picture, pixels
CONTOUR = (255, 190, 0)
NOTICE = "Synthetic images. Research use only, not a medical device."


def write_pages(scans: Sequence[Scan], folder: Path) -> list[Path]:
    """Write `<lesion type>.png` for every type: axial, coronal and sagittal, with the contour.

    Each row is one image, at the lesion's slice with most voxels: three planes as they are, then
    the same with the contour of the mask. Left in the picture is the patient's right.
    """
    make_folders(folder)
    paths = []
    for kind in dict.fromkeys(scan.lesion_type for scan in scans):
        rows = [row for scan in _chosen(scans, kind) for row in [_row(scan)]]
        path = folder / f"{kind.replace(' ', '-')}.png"
        data = io.BytesIO()
        _page(kind, rows).save(data, "PNG", optimize=True)
        write_file(path, data.getvalue())
        paths.append(path)
    return paths


def _chosen(scans: Sequence[Scan], kind: str) -> Iterator[Scan]:
    """All images of the last subjects of every data set of a type: the test subjects."""
    for dataset in dict.fromkeys(s.dataset for s in scans if s.lesion_type == kind):
        mine = [scan for scan in scans if scan.dataset == dataset]
        subjects = list(dict.fromkeys(scan.subject for scan in mine))[-SUBJECTS:]
        yield from (scan for scan in mine if scan.subject in subjects)


def _row(scan: Scan) -> tuple[str, Image.Image]:
    image = read_nifti(scan.image).reorient("RAS").array.astype(np.float32)
    lesion = read_nifti(scan.label).reorient("RAS").array > 0
    head = image[image > 0]
    top = float(np.percentile(head, 99.7)) if head.size else 1.0
    grey = np.clip(image / top, 0, 1)
    planes = []
    for axis in (2, 1, 0):
        others = tuple(other for other in range(3) if other != axis)
        index = int(lesion.sum(axis=others).argmax()) if lesion.any() else image.shape[axis] // 2
        planes.append((_plane(grey, axis, index), _plane(lesion, axis, index)))
    pictures = [_picture(g, None) for g, _ in planes] + [_picture(g, m) for g, m in planes]
    row = Image.new("RGB", (sum(p.width for p in pictures), HEIGHT))
    left = 0
    for each in pictures:
        row.paste(each, (left, 0))
        left += each.width
    return f"{scan.dataset} {scan.subject} {scan.modality}", row


def _plane(array: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """A slice with up pointing up; in axial and coronal ones the patient's right is on the left."""
    flat = np.take(array, index, axis=axis).T[::-1]
    return np.asarray(flat[:, ::-1] if axis > 0 else flat)


def _picture(grey: NDArray[np.float32], lesion: NDArray[np.bool_] | None) -> Image.Image:
    width = round(HEIGHT * grey.shape[1] / grey.shape[0])
    pixels = Image.fromarray((grey * 255).astype(np.uint8)).resize((width, HEIGHT)).convert("RGB")
    if lesion is not None:
        mask = Image.fromarray((lesion * 255).astype(np.uint8)).resize((width, HEIGHT))
        inside = np.asarray(mask) > 127
        core = inside.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                core &= np.roll(inside, step, axis)
        colours = np.array(pixels)
        colours[inside & ~core] = CONTOUR
        pixels = Image.fromarray(colours)
    return pixels


def _page(kind: str, rows: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    caption = 14
    width = max(row.width for _, row in rows)
    page = Image.new("RGB", (width, 2 * caption + len(rows) * (HEIGHT + caption)))
    draw = ImageDraw.Draw(page)
    draw.text((4, 1), f"{kind}. {NOTICE}", fill=(255, 255, 255))
    top = 2 * caption
    for text, row in rows:
        draw.text((4, top - caption + 1), text, fill=(200, 200, 200))
        page.paste(row, (0, top))
        top += HEIGHT + caption
    return page
