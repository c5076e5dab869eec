"""The program that registers: its matrix is turned the right way, and its failures are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import PreparationError
from mome_sdk.preprocess import register
from mome_sdk.preprocess.quality import centre_mm
from mome_sdk.volume import Volume
from phantom import phantom

SCRIPTS = {
    "ends with an error": "#!/bin/sh\nexit 3\n",
    "writes no matrix": "#!/bin/sh\nexit 0\n",
    "writes another matrix": "#!/bin/sh\nfor w; do case $w in *matrix.json) f=$w;; esac; done\n"
    'echo \'{"fixed_to_moving": [[1, 0], [0, 1]]}\' > "$f"\n',
}


def program(text: str, folder: Path) -> str:
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_matrix_goes_from_the_scan_to_the_template(
    tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that finds: the template's mm are those of the scan that it gets + (1, 2, 3)."""
    script = (
        "#!/bin/sh\nfor w; do case $w in *matrix.json) f=$w;; esac; done\n"
        'echo \'{"fixed_to_moving": [[1,0,0,-1],[0,1,0,-2],[0,0,1,-3],[0,0,0,1]]}\' > "$f"\n'
    )
    monkeypatch.setattr("niimath.bin", program(script, tmp_path))
    scan = phantom()
    moved = np.array(scan.affine)
    moved[:3, 3] += (30.0, -20.0, 500.0)
    centre, shift = centre_mm(tiny_bundle), np.array((1.0, 2.0, 3.0))
    found = list(register.registrations(Volume(scan.array, moved), tiny_bundle.template, centre))
    assert len(found) == 4
    # The first start has the head's centre on the template's, then the program adds its own.
    middle = Volume(scan.array, moved).grid.to_mm(np.argwhere(scan.array > 0)).mean(axis=0)
    there = found[0] @ (*middle, 1.0)
    np.testing.assert_allclose(there[:3], centre + shift, atol=1.5)
    np.testing.assert_allclose(found[1][:3, 3], shift)  # as the header says
    for nodded in found[2:]:
        np.testing.assert_allclose((nodded @ (*middle, 1.0))[:3], centre + shift, atol=1.5)
        assert abs(nodded[1, 2]) == pytest.approx(np.sin(np.radians(25.0)))


@pytest.mark.parametrize("how", SCRIPTS)
def test_a_program_that_fails_is_one_error(
    how: str, tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("niimath.bin", program(SCRIPTS[how], tmp_path))
    with pytest.raises(PreparationError, match="ended with an error") as caught:
        list(register.registrations(phantom(), tiny_bundle.template, centre_mm(tiny_bundle)))
    assert caught.value.code == "registration.failed"


def test_a_program_that_hangs_is_ended(
    tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("niimath.bin", program("#!/bin/sh\nexec sleep 60\n", tmp_path))
    monkeypatch.setattr(register, "_TIMEOUT_S", 0.05)
    with pytest.raises(PreparationError, match="TimeoutExpired"):
        list(register.registrations(phantom(), tiny_bundle.template, centre_mm(tiny_bundle)))


def test_necks_and_shoulders_do_not_move_the_centre(tiny_bundle: ModelBundle) -> None:
    scan = phantom()
    long = scan.pad((0, 0, 40), (0, 0, 0))
    array = np.array(long.array)
    array[:, :, :40] = 90.0  # 160 mm of neck and shoulders
    array[[0, -1]] = 0.0
    array[:, [0, -1]] = 0.0
    centre = centre_mm(tiny_bundle)
    plain = register._centred(scan, centre, 0.0)
    necked = register._centred(Volume(array, long.affine), centre, 0.0)
    # Three quarters of them are left out; all of them would move the centre by 80 mm.
    assert np.linalg.norm(plain[:3, 3] - necked[:3, 3]) < 25.0
