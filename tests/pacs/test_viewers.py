"""What people see: the SEG in OHIF on the source series; scan and mask on the node's own page."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page

from dicom_files import PATIENT_ID, PATIENT_NAME, classic, save, turned
from mome_sdk.pacs import api
from mome_sdk.volume import Volume
from pacs.conftest import DICOM, HTTP, OWN_HTTP, storescu, wait_until
from pacs.viewer import browser_page, coloured, grey, ohif_site
from phantom import grid, phantom

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
SCREENS = ROOT / "build" / "screens"  # kept, for whoever wants to look
ALONE = "body * { visibility: hidden !important } canvas { visibility: visible !important }"
NO_TOUR = ".shepherd-element, [class*=shepherd-modal] { display: none !important }"
SITE_PORT = 18080
SLICE = re.compile(r"I:\s*(\d+) \(\d+/40\)")
TROUBLE = re.compile(r"\b(error|not supported|unsupported|failed|wrong|sorry)", re.IGNORECASE)


@pytest.fixture(scope="module")
def chromium(require_program: Callable[[str], Path]) -> Path:
    SCREENS.mkdir(parents=True, exist_ok=True)
    return require_program("chromium")


@pytest.fixture(scope="module")
def packages(require_program: Callable[[str], Path]) -> dict[str, Path]:
    """npm package -> its unpacked folder; all are fetched before the network is left."""
    found = {}
    require_program("npm")
    for name in ("@ohif/app", "@niivue/niivue"):
        found[name] = ROOT / "build" / "npm" / name.partition("/")[2]
        command = [ROOT / "packaging" / "npm.sh", name, found[name]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        if done.returncode != 0:
            pytest.skip(f"The npm package {name} could not be fetched: {done.stderr[-300:]}")
    return found


@pytest.fixture(scope="module")
def ohif(packages: dict[str, Path]) -> Path:
    return packages["@ohif/app"] / "dist"


@pytest.fixture(scope="module")
def niivue(packages: dict[str, Path]) -> Path:
    return packages["@niivue/niivue"] / "dist" / "index.js"


@pytest.fixture
def scan() -> Volume:
    """An oblique head with one lesion, left and in front."""
    return phantom(where=turned(grid(4.0).reorient("LPS"), 15.0, (1.0, 1.0, 0.2)))


class Drawn:
    """Where a viewer draws the voxels of a slice: fitted into the picture, without margins.

    Viewers differ by half a voxel in where the middle is: the outline of the head tells.

    Args:
        image: The slice, (columns, rows).
        picture: What is on the screen, grey (y, x).
    """

    def __init__(self, image: NDArray[np.float32], picture: NDArray[np.uint8]) -> None:
        self.shape, self.shift = picture.shape, (0, 0)
        there, here = np.argwhere(picture > 25), np.argwhere(self.pixels(image > 50))
        offset = there.mean(axis=0) - here.mean(axis=0)
        self.shift = (round(float(offset[0])), round(float(offset[1])))
        voxel = min(self.shape[0] / image.shape[1], self.shape[1] / image.shape[0])
        assert np.abs(offset).max() < voxel, "the slice is not where it should be"

    def pixels(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The pixels (y, x) of a mask (columns, rows)."""
        (height, width), (columns, rows) = self.shape, mask.shape
        scale = min(width / columns, height / rows)
        y = (np.arange(height) + 0.5 - height / 2 - self.shift[0]) / scale + rows / 2
        x = (np.arange(width) + 0.5 - width / 2 - self.shift[1]) / scale + columns / 2
        inside = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < columns))[None]
        row, column = y.astype(int).clip(0, rows - 1), x.astype(int).clip(0, columns - 1)
        return np.asarray(mask.T[np.ix_(row, column)] & inside)


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same and the eight neighbours of each voxel."""
    wide = np.pad(mask, 1)
    shifts = [
        wide[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)
    ]
    return np.logical_or.reduce(shifts)


def shoot_canvas(page: Page, path: Path) -> NDArray[np.uint8]:
    """The viewer's canvas without what lies over it, into a file; grey (rows, columns)."""
    style = page.add_style_tag(content=ALONE)
    page.locator("canvas").first.screenshot(path=path)
    style.evaluate("element => element.remove()")
    return grey(path)


def test_ohif_shows_the_lesions_where_they_are_and_nowhere_else(
    ohif, chromium, orthanc, serve, configure, scan, tmp_path
):
    """As a reader does it: the study is opened, its scan is shown, its SEG is double-clicked.

    An address with `initialSeriesInstanceUID` of the SEG is another way, see docs/pacs.md.
    """
    service = serve(configure())
    save(classic(scan, "FLAIR"), tmp_path / "study")
    assert storescu(tmp_path / "study", "-aec", "ORTHANC", port=DICOM) == 0
    assert storescu(tmp_path / "study") == 0
    assert wait_until(lambda: service.queue.counts()["delivered"] == 1, 30)
    (study,) = orthanc.get("/studies?expand")
    address = f"viewer?StudyInstanceUIDs={study['MainDicomTags']['StudyInstanceUID']}"
    with ohif_site(ohif, HTTP, SITE_PORT) as site, browser_page(chromium) as (page, errors):
        page.goto(f"{site}/{address}")
        page.add_style_tag(content=NO_TOUR)
        page.get_by_text(SLICE).wait_for(timeout=60_000)
        picture = SCREENS / "ohif-canvas.png"
        assert wait_until(lambda: (shoot_canvas(page, picture) > 25).mean() > 0.2, 60)
        assert not coloured(picture).any()
        page.get_by_text("MoME lesions").first.dblclick()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            page.screenshot(path=SCREENS / "ohif.png")
            said = page.evaluate("document.body.innerText")
            shoot_canvas(page, picture)
            number = SLICE.search(said)
            if number is not None and coloured(picture).any():
                break
            page.wait_for_timeout(500)
        page.wait_for_timeout(2000)  # for what goes wrong late
        said = page.evaluate("document.body.innerText")
        page.screenshot(path=SCREENS / "ohif.png")
    assert number is not None, said
    shown = coloured(picture)
    lesion = scan.array[:, :, int(number.group(1)) - 1] > 250
    assert lesion.sum() >= 4
    drawn = Drawn(scan.array[:, :, int(number.group(1)) - 1], grey(picture))
    found, near = drawn.pixels(lesion), drawn.pixels(grown(lesion))
    print(
        f"\nslice {number.group(1)}: {shown.sum()} coloured pixels, {(shown & found).sum()} of "
        f"{found.sum()} of the lesion, {(shown & ~near).sum()} further than a voxel from it"
    )
    # The outline tells the shift to a pixel or two; the edges of the lesion are that uncertain.
    assert (shown & found).sum() > 0.8 * found.sum()
    assert not (shown & ~near).any()
    for flip in (np.s_[::-1, :], np.s_[:, ::-1]):  # this can fail: a mirrored SEG would be seen
        assert (shown & ~drawn.pixels(grown(lesion[flip]))).any()
    assert "MoME lesions" in said
    assert not TROUBLE.search(said), said
    assert errors == []


def test_the_page_shows_scan_and_mask_of_a_study(
    niivue, chromium, orthanc, serve, configure, scan, tmp_path, monkeypatch
):
    """NiiVue, from the node itself: nothing is fetched from anywhere else."""
    static = tmp_path / "static"
    shutil.copytree(api.STATIC, static)
    shutil.copyfile(niivue, static / "niivue.js")
    monkeypatch.setattr(api, "STATIC", static)
    service = serve(configure())
    assert orthanc.get("/system")
    save(classic(scan, "FLAIR"), tmp_path / "study")
    assert storescu(tmp_path / "study") == 0
    assert wait_until(lambda: service.queue.counts()["delivered"] == 1, 30)
    with browser_page(chromium) as (page, errors):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{OWN_HTTP}/jobs/1")
        page.get_by_text("shown", exact=True).wait_for(timeout=60_000)
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENS / "niivue.png")
        picture = SCREENS / "niivue-canvas.png"
        page.locator("canvas").screenshot(path=picture)
        text = page.content()
    red = coloured(picture)
    assert 0.0005 < red.mean() < 0.05
    assert errors == []
    assert all(url.startswith((f"http://127.0.0.1:{OWN_HTTP}/", "blob:", "data:")) for url in asked)
    for secret in (PATIENT_ID, *PATIENT_NAME.split("^")):
        assert secret not in text
