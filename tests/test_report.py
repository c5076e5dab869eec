"""The picture and the report: right is left, proportions are true, nothing is fetched or run."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mome_sdk.bundle import ModelBundle
from mome_sdk.nifti import NOTICE
from mome_sdk.report import lesion_table, picture, registration_picture, report
from mome_sdk.segmentation import Segmentation
from mome_sdk.volume import Grid, Volume
from phantom import ORIENTATIONS, grid, phantom

SHARES = {
    "T1": {"lesion": 0.7, "brain": 0.5},
    "FLAIR": {"lesion": 0.3, "brain": 0.5},
}


def segmented(volume: Volume, **more: object) -> Segmentation:
    return Segmentation((volume.array > 200).astype(np.uint8), volume.affine, **more)  # type: ignore[arg-type]


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def marked(png: bytes) -> np.ndarray:
    """Where pixels are of the lesions' colour; rows x columns, without the line of text below."""
    rgb = pixels(png)[:-64]
    return (rgb[..., 0] - rgb[..., 2]) > 100


def test_the_patients_left_is_on_the_right_of_the_picture() -> None:
    volume = phantom(lesion_mm=(-40.0, 20.0, 14.0))
    axial, coronal, _ = np.array_split(
        np.arange(pixels(picture(volume, segmented(volume))).shape[1]), 3
    )
    columns = np.flatnonzero(marked(picture(volume, segmented(volume))).any(axis=0))
    for panel in (axial, coronal):
        inside = columns[(columns >= panel[0]) & (columns <= panel[-1])]
        assert inside.size
        assert inside.mean() > panel.mean() + 40


def test_the_picture_does_not_depend_on_the_axes() -> None:
    volume = phantom()
    expected = pixels(picture(volume, segmented(volume)))
    for axes in ORIENTATIONS[::5]:
        turned = volume.reorient(axes)
        np.testing.assert_array_equal(pixels(picture(turned, segmented(turned))), expected)


def test_proportions_are_true_on_thick_slices() -> None:
    thin = phantom(where=grid(2.0))
    affine = np.diag((2.0, 2.0, 8.0, 1.0))
    affine[:3, 3] = thin.affine[:3, 3]
    thick = phantom(where=Grid((80, 96, 20), affine))
    sizes = [pixels(picture(v, segmented(v))).shape for v in (thin, thick)]
    # One slice of 8 mm is cut off or added above and below: 16 of about 160 mm.
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.1)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((9, 9, 9)),
        np.full((3, 40, 2), 7.0),
        np.random.default_rng(0).normal(size=(20, 30, 10)) - 1000.0,
    ],
)
def test_pictures_without_lesion_or_head_are_still_pictures(array: np.ndarray) -> None:
    volume = Volume(array, np.eye(4))
    empty = Segmentation(np.zeros(array.shape, np.uint8), np.eye(4))
    assert not marked(picture(volume, empty)).any()


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    volume = phantom()
    result = segmented(
        volume,
        expert_share=SHARES,
        timings={"network": 12.345},
        provenance={
            "bundle": "<i>demo</i>",
            "mirror": "none",
            "patch": [64, 64, 64],
            "export": {"target": "onnx", "experts": "grouped"},
        },
    )
    return report(result, picture(volume, result), title="<script>alert('1')</script> & co")


def test_the_report_holds_all_that_was_found(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    text = " ".join(parsed.text.split())
    shown = ("64, 64, 64", "70.0 %", "mirror", "target onnx, experts grouped")
    for part in (NOTICE, "-32.", "12.35 s", *shown):
        assert part in text


def test_the_report_fetches_and_runs_nothing(page: str) -> None:
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "iframe", "object", "i"})
    assert "<script>alert('1')</script> & co" in parsed.text, "shown as text"
    sources = [
        value
        for _, attrs in parsed.tags
        for name, value in attrs.items()
        if name in ("src", "href")
    ]
    assert len(sources) == 1
    assert sources[0] is not None
    assert sources[0].startswith("data:image/png;base64,")
    policy = next(a["content"] for t, a in parsed.tags if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "url(" not in page


def test_the_report_can_be_read_aloud(page: str) -> None:
    tags = Page(page).tags
    assert ("html", {"lang": "en"}) in tags
    assert all(attrs["alt"] for tag, attrs in tags if tag == "img")
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")


def test_a_report_without_lesions_says_so() -> None:
    empty = Segmentation(
        np.zeros((3, 3, 3), np.uint8),
        np.eye(4),
        expert_share={"T1": {"lesion": None, "brain": 1.0}},
    )
    text = Page(report(empty, b"", title="x")).text
    assert "No lesion found." in text
    assert "no lesion" in text


def test_tables_are_cut_and_say_so() -> None:
    mask = np.zeros((21, 21, 21), np.uint8)
    mask[::2, ::2, 0] = 1
    result = Segmentation(mask, np.eye(4))
    lines = lesion_table(result.lesions).splitlines()
    assert len(lines) == 12
    assert lines[-1].split() == ["...", "111", "smaller", "ones,", "0.111", "mL", "together"]
    assert "91 smaller ones, 0.091 mL together" in report(result, b"", title="x")


def test_the_registration_picture_shows_the_outline_of_the_templates_brain(
    tiny_bundle: ModelBundle,
) -> None:
    """Blue, unlike lesions; and where the registration puts it, not where the header says."""
    scan = tiny_bundle.template
    png = registration_picture(scan, np.eye(4), tiny_bundle)
    outline = blue(png)
    assert 1000 < np.count_nonzero(outline) < 20_000
    assert not marked(png).any()
    shift = np.eye(4)
    shift[:3, 3] = (25.0, -10.0, 40.0)
    moved = Volume(scan.array, np.linalg.inv(shift) @ scan.affine)
    np.testing.assert_array_equal(blue(registration_picture(moved, shift, tiny_bundle)), outline)


def blue(png: bytes) -> np.ndarray:
    rgb = pixels(png)[:-64]
    return (rgb[..., 2] - rgb[..., 0]) > 100


def test_the_report_shows_the_registration_and_what_was_overruled() -> None:
    volume = phantom()
    preparation = {
        "registration": "a program 1.0",
        "to_template": np.eye(4).tolist(),
        "brain": "template",
        "quality": {"similarity": 0.0123, "brain_ml": 1500.0},
        "forced": ["registration.poor"],
    }
    result = segmented(volume, provenance={"bundle": "x", "preparation": preparation})
    png = picture(volume, result)
    page = report(result, png, title="x", registration=png)
    for text in ("a program 1.0", "0.0123", "registration.poor", "left and right are swapped"):
        assert text in page
    assert "left and right are swapped" not in report(result, png, title="x")
