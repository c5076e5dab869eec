"""Overlay picture (PNG), HTML report and lesion table of one segmentation."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from mome_sdk import _core
from mome_sdk.model import Model
from mome_sdk.nifti import NOTICE
from mome_sdk.preprocess.intensity import background_of
from mome_sdk.segmentation import Lesion, Segmentation
from mome_sdk.volume import Volume

# The picture: pixels per millimetre are chosen so that the longest edge of the head fits.
_LONGEST_EDGE_PX = 440
_GAP_PX = 16
_LESION_RGB = (255, 94, 58)
_OUTLINE_RGB = (92, 200, 255)
_MOST_ROWS = 30

_GREY, _DIM, _WHITE = (232, 232, 232), (150, 150, 150), (255, 255, 255)


@dataclass(frozen=True)
class _Plane:
    """How one anatomical plane of an RAS volume is shown; arrays are rows x columns."""

    name: str
    through: int  # the RAS axis that the plane is perpendicular to
    letters: str  # left, right, top, bottom


# Radiological convention: the patient's right is on the left of the picture.
_PLANES = (
    _Plane("axial", 2, "RLAP"),
    _Plane("coronal", 1, "RLSI"),
    _Plane("sagittal", 0, "APSI"),
)


_WORDS = (("right", "left"), ("anterior", "posterior"), ("superior", "inferior"))


def picture(volume: Volume, segmentation: Segmentation) -> bytes:
    """A PNG of three planes through the largest lesion, with all lesions marked.

    Args:
        volume: The image that was segmented (I, J, K), any axes.
        segmentation: Its lesions, on the same grid.

    Returns:
        PNG bytes: axial, coronal and sagittal plane, each where the largest lesion has most
        voxels (or through the middle of the head, when there is none), in true proportions, in
        radiological convention with letters for the directions and a bar of 50 mm. Lesions are
        tinted and outlined. On a tilted grid the planes are those of the grid.
    """
    image = volume.reorient("RAS")
    mask = Volume(segmentation.mask, segmentation.affine).reorient("RAS").array
    low, high = _grey_range(image)
    head = image.array > low + 0.05 * (high - low)
    box = _bounds(head | (mask > 0), image.grid.spacing_mm)
    marks = _Marks(mask, _LESION_RGB, tint=0.2)
    return _png(image, marks, box, _planes_through(mask, box), headline(segmentation))


def registration_picture(volume: Volume, to_template: NDArray[np.float64], bundle: Model) -> bytes:
    """A PNG that shows whether a scan was registered rightly.

    Args:
        volume: The scan (I, J, K), any axes.
        to_template: 4x4, RAS mm of the scan to RAS mm of the template.
        bundle: Whose template is meant.

    Returns:
        PNG bytes: three planes through the middle of the template's brain, with the scan as it was
        registered and the outline of the template's brain. Right is where the outline runs along
        the surface of the brain.
    """
    brain = bundle.brain_mask
    there = Volume(volume.array, to_template @ volume.affine)
    image = there.resample(brain.grid, mode="linear", fill=background_of(volume))
    everything = np.ones(image.array.shape, bool)
    box = _bounds(everything, image.grid.spacing_mm)
    index = [round(axis.mean()) for axis in np.nonzero(brain.array)]
    marks = _Marks(brain.array, _OUTLINE_RGB, tint=0.0)
    return _png(image, marks, box, index, "Outline of the template's brain")


class _Marks(NamedTuple):
    """What is drawn over an image: not 0 inside, on its grid; outlined, and filled by `tint`."""

    mask: NDArray[np.uint8]
    colour: tuple[int, int, int]
    tint: float


def _png(
    image: Volume,
    marks: _Marks,
    box: tuple[slice, slice, slice],
    index: Sequence[int],
    title: str,
) -> bytes:
    """Three planes (RAS axes) through the voxel `index`, cut to `box`."""
    low, high = _grey_range(image)
    lengths_mm = [
        (part.stop - part.start) * spacing
        for part, spacing in zip(box, image.grid.spacing_mm, strict=True)
    ]
    px_per_mm = _LONGEST_EDGE_PX / max(lengths_mm)
    positions_mm = image.grid.to_mm(index)
    panels, captions = [], []
    for plane in _PLANES:
        place: list[slice | int] = list(box)
        place[plane.through] = index[plane.through]
        shown = [axis for axis in range(3) if axis != plane.through]
        size = tuple(max(1, round(lengths_mm[axis] * px_per_mm)) for axis in shown)
        grey = np.clip((image.array[tuple(place)] - low) / np.float32(high - low), 0.0, 1.0)
        plane_marks = marks._replace(mask=marks.mask[tuple(place)])
        panels.append(_panel(grey, plane_marks, (size[0], size[1])))
        captions.append(f"{plane.name}, {_side(plane.through, positions_mm[plane.through])}")
    stream = io.BytesIO()
    _composed(panels, captions, px_per_mm, title, marks.colour).save(stream, "PNG")
    return stream.getvalue()


def report(
    segmentation: Segmentation, png: bytes, *, title: str, registration: bytes | None = None
) -> str:
    """An HTML page that needs nothing else: picture, lesions, shares, provenance, notice.

    Args:
        segmentation: What to report.
        png: The picture, embedded as it is.
        title: Names the case; shown as text, whatever it holds.
        registration: The picture of the registration, where the image was registered here.
    """
    lesions = segmentation.lesions
    values = {
        "title": html.escape(title),
        "notice": html.escape(NOTICE),
        "model": html.escape(str(segmentation.provenance.get("bundle", ""))),
        "count": str(len(lesions)),
        "volume": f"{segmentation.volume_ml:.2f}",
        "largest": f"{lesions[0].volume_ml:.2f}" if lesions else "0.00",
        "picture": base64.b64encode(png).decode("ascii"),
        "alt": html.escape(
            "Axial, coronal and sagittal plane of the image with the lesions marked. "
            + headline(segmentation)
        ),
        "lesions": _lesion_rows(lesions),
        "shares": _share_section(segmentation),
        "timings": _rows((stage, f"{s:.2f} s") for stage, s in segmentation.timings.items()),
        "provenance": _rows(_flat(segmentation.provenance)),
        "registration": _registration_section(segmentation, registration),
    }
    return _PAGE.substitute(values)


def lesion_table(lesions: Sequence[Lesion], *, most: int = 10) -> str:
    """The largest lesions as lines of text: number, mL, voxels, centroid in RAS mm."""
    lines = [f"{'lesion':>6} {'mL':>9} {'voxels':>8}   {'R':>7} {'A':>7} {'S':>7}  mm"]
    for lesion in lesions[:most]:
        r, a, s = lesion.centroid_mm
        lines.append(
            f"{lesion.index:>6} {lesion.volume_ml:>9.3f} {lesion.voxels:>8}   "
            f"{r:>7.1f} {a:>7.1f} {s:>7.1f}"
        )
    if len(lesions) > most:
        rest = lesions[most:]
        lines.append(
            f"   ... {len(rest)} smaller ones, {sum(x.volume_ml for x in rest):.3f} mL together"
        )
    return "\n".join(lines)


def headline(segmentation: Segmentation) -> str:
    """How many lesions and how much, in one sentence."""
    count = len(segmentation.lesions)
    if count == 0:
        return "No lesion found."
    return f"{count} lesion{'s' if count > 1 else ''}, {segmentation.volume_ml:.2f} mL in all."


def _grey_range(image: Volume) -> tuple[float, float]:
    """Black and white point: the head without its darkest 0.5 % and its brightest 0.2 %."""
    head = image.array[image.array != background_of(image)]
    sample = head[:: max(1, head.size // 200_000)] if head.size else image.array.ravel()
    low, high = np.percentile(sample, (0.5, 99.8))
    return float(low), float(high) if high > low else float(low) + 1.0


def _bounds(
    inside: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> tuple[slice, slice, slice]:
    """The smallest box with everything that is inside, and 5 mm more on each side."""
    box = []
    for axis, (length, spacing) in enumerate(zip(inside.shape, spacing_mm, strict=True)):
        margin = math.ceil(5.0 / spacing)
        used = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (int(used[0]), int(used[-1])) if used.size else (0, length - 1)
        box.append(slice(max(0, first - margin), min(length, last + 1 + margin)))
    return box[0], box[1], box[2]


def _planes_through(mask: NDArray[np.uint8], box: tuple[slice, slice, slice]) -> list[int]:
    """RAS array index of the three planes: where the largest lesion has most voxels."""
    components, count = _core.connected_components(np.ascontiguousarray(mask))
    if count == 0:
        return [(part.start + part.stop) // 2 for part in box]
    return [int(np.bincount(axis).argmax()) for axis in np.nonzero(components == 1)]


def _panel(grey: NDArray[np.floating[Any]], marks: _Marks, size: tuple[int, int]) -> Image.Image:
    """One plane (two RAS axes) as a picture of `size` pixels, with the marks over it.

    The first axis becomes columns and the second rows, both reversed: R, A and S point left or up.
    """
    turned = np.ascontiguousarray(grey.T[::-1, ::-1] * 255.0)
    plain = Image.fromarray(turned.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    plain = plain.convert("RGB")
    drawn = Image.fromarray((marks.mask.T[::-1, ::-1] > 0).astype(np.uint8) * 255)
    inside = drawn.resize(size, Image.Resampling.BICUBIC).point([0] * 128 + [255] * 128)
    outline = ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(3)))
    colour = Image.new("RGB", size, marks.colour)
    panel = Image.composite(Image.blend(plain, colour, marks.tint), plain, inside)
    return Image.composite(colour, panel, outline)


def _composed(
    panels: list[Image.Image],
    captions: list[str],
    px_per_mm: float,
    title: str,
    colour: tuple[int, int, int],
) -> Image.Image:
    """The panels side by side on black, with letters, captions, a bar of 50 mm and the notice."""
    height = max(panel.height for panel in panels)
    width = sum(panel.width for panel in panels) + _GAP_PX * (len(panels) + 1)
    top = 44
    canvas = Image.new("RGB", (width, top + height + 64), (0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    left = _GAP_PX
    for plane, panel, caption in zip(_PLANES, panels, captions, strict=True):
        upper = top + (height - panel.height) // 2
        canvas.paste(panel, (left, upper))
        right, lower = left + panel.width, upper + panel.height
        middle = ((left + right) // 2, (upper + lower) // 2)
        draw.text((left + panel.width // 2, 12), caption, _GREY, _font(17), anchor="ma")
        for letter, place, anchor in zip(
            plane.letters,
            ((left + 4, middle[1]), (right - 4, middle[1]), (middle[0], upper), (middle[0], lower)),
            ("lm", "rm", "ma", "md"),
            strict=True,
        ):
            draw.text(
                place, letter, _WHITE, _font(17), anchor=anchor, stroke_width=2, stroke_fill=0
            )
        left = right + _GAP_PX
    baseline = top + height + 30
    bar_px = round(50 * px_per_mm)
    draw.rectangle((_GAP_PX, baseline - 1, _GAP_PX + bar_px, baseline + 1), _GREY)
    draw.text((_GAP_PX + bar_px + 8, baseline), "50 mm", _GREY, _font(15), anchor="lm")
    draw.text((width // 2, baseline), title, colour, _font(17), anchor="mm")
    draw.text((width - _GAP_PX, baseline), NOTICE, _DIM, _font(15), anchor="rm")
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _side(axis: int, mm: float) -> str:
    """A position along one RAS axis in words that need no sign: "32 mm left"."""
    positive, negative = _WORDS[axis]
    return f"{abs(mm):.0f} mm {positive if mm >= 0 else negative}"


def _rows(items: Iterable[tuple[str, object]]) -> str:
    """Rows of a table with the name as its heading; every value is shown as text."""
    texts = ((html.escape(str(name)), html.escape(_shown(value))) for name, value in items)
    return "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in texts)


def _flat(provenance: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The provenance without the preparation, which has a section of its own."""
    return ((name, value) for name, value in provenance.items() if name != "preparation")


def _registration_section(segmentation: Segmentation, png: bytes | None) -> str:
    """The registered scan with the template's outline, and its figures."""
    made = segmentation.provenance.get("preparation")
    if png is None or made is None:
        return ""
    forced = ", ".join(made["forced"])
    rows = {
        "registration": made["registration"],
        "brain": made["brain"],
        **made["quality"],
        "checks overruled": forced or "none",
    }
    return _REGISTRATION.substitute(
        picture=base64.b64encode(png).decode("ascii"), rows=_rows(rows.items())
    )


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return "" if value is None else str(value)


def _lesion_rows(lesions: Sequence[Lesion]) -> str:
    rows = [
        f'<tr><th scope="row">{lesion.index}</th><td>{lesion.volume_ml:.3f}</td>'
        f"<td>{lesion.voxels}</td>"
        + "".join(f"<td>{mm:.1f}</td>" for mm in lesion.centroid_mm)
        + "</tr>"
        for lesion in lesions[:_MOST_ROWS]
    ]
    if len(lesions) > _MOST_ROWS:
        rest = lesions[_MOST_ROWS:]
        rows.append(
            f'<tr><td colspan="6">{len(rest)} smaller ones, '
            f"{sum(lesion.volume_ml for lesion in rest):.3f} mL together</td></tr>"
        )
    return "".join(rows) or '<tr><td colspan="6">No lesion found.</td></tr>'


def _share_section(segmentation: Segmentation) -> str:
    """Bars for the experts' shares; nothing when they were not measured."""
    if segmentation.expert_share is None:
        return ""
    rows = []
    for modality, parts in segmentation.expert_share.items():
        cells = "".join(_bar(parts[region]) for region in ("lesion", "brain"))
        rows.append(f'<tr><th scope="row">{html.escape(modality)}</th>{cells}</tr>')
    return _SHARES.substitute(rows="".join(rows))


def _bar(share: float | None) -> str:
    if share is None:
        return "<td>no lesion</td>"
    return (
        f'<td class="bar"><span style="width:{100 * share:.1f}%"></span>'
        f"<b>{100 * share:.1f} %</b></td>"
    )


_SHARES = Template(
    """<section><h2>Share of each expert</h2>
<p>Mean of |expert &times; gate| in the fused output, of all experts together. It says how much an
expert took part, not which modality the image has.</p>
<table><thead><tr><th scope="col">Expert</th><th scope="col">in the lesions</th>
<th scope="col">in the brain</th></tr></thead><tbody>$rows</tbody></table></section>"""
)

_REGISTRATION = Template(
    """<section><h2>Registration</h2>
<p>Look at this picture first: the outline of the template's brain has to run along the surface of
the brain. Nobody can see in an image whether left and right are swapped.</p>
<figure><img src="data:image/png;base64,$picture" alt="Axial, coronal and sagittal plane of the
registered scan with the outline of the template's brain."></figure>
<table><tbody>$rows</tbody></table></section>"""
)

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: lesion report</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --paper: #ffffff;
  --card: #f5f6f8; --line: #d5d9de; --lesion: #c8371a; --bar: #f2a48f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #9aa2ab; --paper: #14171a;
  --card: #1d2125; --line: #343a40; --lesion: #ff7a5c; --bar: #8a3b28; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.25rem 0 .5rem; font-size: 1.15rem; }
p { margin: .25rem 0 .75rem; color: var(--dim); max-width: 46rem; }
.notice { margin: .75rem 0 0; padding: .5rem .8rem; color: var(--ink); max-width: none;
  border-left: .3rem solid var(--lesion); background: var(--card); }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.25rem 0; padding: 0; }
.numbers div { flex: 1 1 9rem; padding: .8rem 1rem; background: var(--card); border-radius: .5rem; }
.numbers dt { color: var(--dim); font-size: .9rem; }
.numbers dd { margin: 0; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: .5rem; background: #000; }
figcaption { margin-top: .4rem; color: var(--dim); font-size: .9rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { padding: .35rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
thead th { color: var(--dim); font-weight: 600; }
tbody th { font-weight: 500; white-space: nowrap; }
.figures td, .figures th { white-space: nowrap; }
.figures td, .figures thead th:not(:first-child) { text-align: right; }
.pair { display: grid; grid-template-columns: 1fr 2fr; gap: 0 2.5rem; align-items: start; }
.bar { position: relative; width: 42%; }
.bar span { display: inline-block; height: .8rem; vertical-align: middle; background: var(--bar);
  border-radius: .2rem; margin-right: .5rem; max-width: calc(100% - 4.5rem); }
.bar b { font-weight: 500; }
@media (max-width: 44rem) { .pair { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<header><h1>$title</h1><p>Lesion report, model: $model</p>
<p class="notice"><strong>$notice.</strong></p></header>
<main>
<dl class="numbers"><div><dt>Lesions</dt><dd>$count</dd></div>
<div><dt>Volume in all</dt><dd>$volume mL</dd></div>
<div><dt>Largest lesion</dt><dd>$largest mL</dd></div></dl>
<figure><img src="data:image/png;base64,$picture" alt="$alt">
<figcaption>Planes where the largest lesion has most voxels, in radiological convention: the
patient's right (R) is on the left of the picture. Lesions are tinted and outlined.</figcaption>
</figure>
<section><h2>Lesions</h2>
<p>Connected by face, edge or corner; no minimum size. Centroids are RAS positions: right, anterior
and superior are positive.</p>
<div class="scroll"><table class="figures"><thead><tr><th scope="col">Lesion</th>
<th scope="col">mL</th><th scope="col">voxels</th><th scope="col">R (mm)</th>
<th scope="col">A (mm)</th><th scope="col">S (mm)</th></tr></thead>
<tbody>$lesions</tbody></table></div></section>
$shares
$registration
<div class="pair">
<section><h2>Time</h2><table class="figures"><tbody>$timings</tbody></table></section>
<section><h2>Provenance</h2><table><tbody>$provenance</tbody></table></section>
</div>
</main>
</body>
</html>
"""
)
