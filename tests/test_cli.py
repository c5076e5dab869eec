"""The command `mome`: what it writes, says and returns."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest

import mome_sdk
from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.cli import main
from mome_sdk.nifti import NOTICE, write_nifti
from mome_sdk.segmenter import Segmenter
from mome_sdk.volume import Volume
from phantom import BrightEngine, phantom

SCHEMA = json.loads(
    (Path(mome_sdk.__file__).parent / "schemas" / "result.schema.json").read_text("utf-8")
)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A small image on the model grid."""
    array = np.random.default_rng(0).normal(100.0, 20.0, (18, 20, 22))
    affine = np.diag((-1.0, 1.0, 1.0, 1.0))
    write_nifti(Volume(array, affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def predict(tiny_bundle: ModelBundle) -> Any:
    """`mome predict` with the tiny bundle, in this process."""
    fixed = ("--model", str(tiny_bundle.path), "--space", "model", "--engine", "onnxruntime")

    def run(*arguments: object) -> int:
        return main(["predict", *map(str, arguments), *fixed])

    return run


def test_one_input_gives_one_mask_and_a_table(
    scan: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = scan.with_name("mask.nii.gz")
    assert predict(scan, "-o", out) == 0
    said = capsys.readouterr()
    assert NOTICE in said.out
    assert re.search(r"\d+ lesions?, \d+\.\d+ mL", said.out)
    assert "onnxruntime, fp32" in said.out
    assert "mirroring none" in said.out
    assert "scan.nii.gz: 8 of 8 windows" in said.err, "plain lines where there is no terminal"
    mask = nib.load(out)
    assert mask.shape == (18, 20, 22)
    assert {path.name for path in scan.parent.iterdir()} == {"scan.nii.gz", "mask.nii.gz"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_clears_it(
    scan: Path, predict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert predict(scan, "-o", scan.with_name("mask.nii.gz")) == 0
    drawn = terminal.getvalue().split("\r")
    assert drawn[1] == f"scan.nii.gz [{'#' * 3}{'-' * 27}] 1/8"
    assert drawn[-2:] == [f"scan.nii.gz [{'#' * 30}] 8/8", "\033[K"]


def test_everything_asked_for_lies_beside_the_mask(
    scan: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = scan.with_name("x.nii.gz")
    assert predict(scan, "-o", out, "--probability", "--report", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    jsonschema.validate(result, SCHEMA)
    assert result["output"] == str(out)
    assert result["picture"] == str(scan.with_name("x.png"))
    assert result["report"] == str(scan.with_name("x.html"))
    assert result["probability"] == str(scan.with_name("x_probability.nii.gz"))
    assert all(Path(result[k]).is_file() for k in ("output", "picture", "report", "probability"))
    share = result["expert_share"]
    assert sum(parts["brain"] for parts in share.values()) == pytest.approx(1.0)
    assert result["volume_ml"] == pytest.approx(sum(x["volume_ml"] for x in result["lesions"]))
    probability = nib.load(result["probability"]).get_fdata()
    np.testing.assert_array_equal(np.asarray(nib.load(out).dataobj), probability > 0.5)
    page = Path(result["report"]).read_text("utf-8")
    assert NOTICE in page
    assert "scan.nii.gz" in page


def test_several_inputs_fill_a_folder(
    scan: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    second = scan.with_name("second.nii")
    write_nifti(Volume(nib.load(scan).get_fdata(), np.eye(4)), second)
    out = scan.with_name("out")
    assert predict(scan, second, "-o", out, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["input"] for line in lines] == [str(scan), str(second)]
    assert {path.name for path in out.iterdir()} == {"scan.nii.gz", "second.nii.gz"}


def test_one_bad_input_of_several_is_named_and_the_others_are_written(
    scan: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = scan.with_name("bad.nii.gz")
    bad.write_bytes(b"text")
    out = scan.with_name("out")
    assert predict(bad, scan, "-o", out, "--json") == 3
    said = capsys.readouterr()
    results = [json.loads(line) for line in said.out.splitlines()]
    for result in results:
        jsonschema.validate(result, SCHEMA)
    assert results[0]["error"]["code"] == "volume.format"
    assert results[1]["output"] == str(out / "scan.nii.gz")
    assert said.err.count("mome: error [volume.format]: bad.nii.gz: ") == 1
    assert {path.name for path in out.iterdir()} == {"scan.nii.gz"}


def test_all_bad_is_a_refusal(scan: Path, predict: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bad = scan.with_name("bad.nii.gz")
    bad.write_bytes(b"text")
    assert predict(bad, scan.with_name("none.nii"), "-o", scan.with_name("out")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_older_output_is_replaced(scan: Path, predict: Any) -> None:
    out = scan.with_name("mask.nii.gz")
    out.write_bytes(b"older")
    assert predict(scan, "-o", out) == 0
    assert nib.load(out).shape == (18, 20, 22)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{scan}", "-o", "{scan}"], "argument.output", "is the input image itself"),
        (["{scan}", "-o", "{dir}"], "argument.output", "ends in .nii or .nii.gz"),
        (["{scan}", "-o", "{dir}/out.png"], "argument.output", "ends in .nii or .nii.gz"),
        (["{scan}", "-o", "{dir}/no/x.nii"], "argument.output-folder", "does not exist"),
        (["{scan}", "{scan}", "-o", "{dir}/out"], "argument.output", "a folder each"),
        (["{scan}", "{dir}/b.nii", "-o", "{dir}"], "argument.output", "is the input image itself"),
        (["{scan}", "{dir}/b.nii", "-o", "{scan}"], "argument.output", "is a file"),
        (["{scan}", "{dir}/b.nii", "-o", "{dir}/a/b"], "argument.output-folder", "does not exist"),
        (["{scan}"], "argument.usage", "-o/--output"),
        (["-o", "{dir}/x.nii"], "argument.usage", "INPUT"),
        (["{scan}", "-o", "{dir}/x.nii", "--space", "talairach"], "argument.usage", "talairach"),
        (["{scan}", "-o", "{dir}/x.nii", "--engine", "abacus"], "argument.usage", "abacus"),
        (["{scan}", "-o", "{dir}/x.nii", "--engine", "tensorrt"], "argument.engine", "bundle"),
        (["{scan}", "-o", "{dir}/x.nii", "--batch", "many"], "argument.usage", "many"),
        (["{scan}", "-o", "{dir}/x.nii", "--step", "2"], "argument.step", "step"),
        (["{scan}", "-o", "{dir}/x.nii", "--model", "{dir}/no"], "bundle.not-found", "no"),
        (["{scan}", "-o", "{dir}/x.nii", "--device", "cuda:0"], "engine.device", "cuda:0"),
        (
            ["{scan}", "-o", "{dir}/x.nii", "--space", "mni"],
            "geometry.not-mni",
            "register the image",
        ),
        (["{scan}", "-o", "{dir}/x.nii"], "brain.cut", "18 x 20 x 22 mm"),
        (["{scan}", "-o", "{dir}/x.nii", "--space", "mni", "--force"], "argument.space", "force"),
        (
            ["{scan}", "-o", "{dir}/x.nii", "--space", "mni", "--reference", "{scan}"],
            *("argument.space", "reference"),
        ),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    code: str,
    text: str,
    scan: Path,
    tiny_bundle: ModelBundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = scan.read_bytes()
    filled = [word.format(scan=scan, dir=scan.parent) for word in arguments]
    defaults = [] if "--model" in filled else ["--model", str(tiny_bundle.path)]
    engine = [] if "--engine" in filled else ["--engine", "onnxruntime"]
    assert main(["predict", *filled, *defaults, *engine]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("mome: error")]
    assert lines == said.err.splitlines()[-1:]
    assert f"[{code}]" in lines[0]
    assert text in lines[0]
    assert "Traceback" not in said.err
    assert scan.read_bytes() == before
    assert not list(scan.parent.glob("*x.nii*")) + list(scan.parent.glob(".*"))


def test_verbose_and_debug_say_more(
    scan: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(scan, "-o", scan.with_name("x.nii"), "-v") == 0
    assert "bundle_sha256: " in capsys.readouterr().err
    assert predict(scan, "-o", scan, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_blamed_on_the_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(ModelBundle, "load", fail)
    assert main(["inspect", "demo"]) == 1
    assert capsys.readouterr().err.startswith("mome: defect: ZeroDivisionError: one two ")


def test_no_memory_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ModelBundle, "load", fail)
    assert main(["inspect", "demo"]) == 2
    assert "[engine.out-of-memory]" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mome_sdk.training.__main__", None)
    assert main(["train", "demo.toml"]) == 2
    assert 'pip install "mome-sdk[train]"' in capsys.readouterr().err


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The phantom in the place of the bundled example."""
    folder = tmp_path / "example"
    folder.mkdir()
    volume = phantom()
    write_nifti(volume, folder / "flair.nii.gz")
    write_nifti(Volume(volume.array > 200, volume.affine), folder / "lesion.nii.gz")
    monkeypatch.setattr("mome_sdk.cli.EXAMPLE", folder)
    return folder


@pytest.mark.usefixtures("example")
def test_demo_prints_a_table_and_writes_mask_picture_and_report(
    tmp_path: Path,
    bright_segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mome_sdk.cli.Segmenter", lambda _: bright_segmenter)
    assert main(["demo", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    dice = re.search(r"^Dice +(\d\.\d+) ", said, re.MULTILINE)
    assert dice is not None
    assert float(dice[1]) > 0.95
    for part in (NOTICE, "lesions         1", " mL", "network", "read", "mirroring none"):
        assert part in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"lesions.nii.gz", "lesions.png", "lesions.html"}


@pytest.mark.slow
def test_the_bundled_model_finds_the_bundled_lesions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path)]) == 0
    dice = re.search(r"^Dice +(\d\.\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert dice is not None
    assert float(dice[1]) >= 0.5


def test_inspect_says_what_a_bundle_is(
    tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_bundle.path)]) == 0
    said = capsys.readouterr().out
    for part in ("tiny", tiny_bundle.sha256, "T1, T1ce, T2, FLAIR, DWI", "16 x 16 x 16", "SAR"):
        assert part in said


def test_doctor_names_engines_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "mome_sdk.describe.ENGINES", dict.fromkeys(["native", "onnxruntime", "abacus"])
    )
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"native       {_core.native_kernels(channels=32)} kernels" in said
    assert f"onnxruntime  {version('onnxruntime')}" in said
    assert 'missing: pip install "mome-sdk[abacus]"' in said
    assert "threads" in said
    build = _core.cuda_build()
    assert ("gpu runner   CUDA " if build else "gpu runner   not built: install") in said


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert version("mome-sdk") == mome_sdk.__version__
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mome {mome_sdk.__version__}\n"
    assert main([]) == 2
    assert "predict" in capsys.readouterr().err
    assert main(["predict", "-h"]) == 0
    said = capsys.readouterr().out
    for option in ("--space", "--mirror", "--blend", "--probability", "--report", "--json"):
        assert option in said
    assert "native,mni" not in said


def test_a_reader_that_goes_away_is_no_error(tiny_bundle: ModelBundle) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mome_sdk", "inspect", str(tiny_bundle.path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


def test_ctrl_c_leaves_nothing(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    write_nifti(
        Volume(np.random.default_rng(0).normal(size=(160, 160, 160)), np.eye(4)),
        tmp_path / "large.nii",
    )
    command = [sys.executable, "-m", "mome_sdk", "predict", str(tmp_path / "large.nii")]
    options = ["-o", str(tmp_path / "x.nii.gz"), "--space", "model", "--step", "0.2"]
    with subprocess.Popen(
        [*command, *options, "--model", str(tiny_bundle.path)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control starts what runs in its background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert "1 of " in process.stderr.readline()  # minutes to go
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "mome: interrupted"
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["large.nii"]


@pytest.fixture
def native_segmenter(whole_head_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    """What `mome predict` makes, with an engine that calls bright voxels lesion."""

    def made(*_: object, **__: object) -> Segmenter:
        return Segmenter(whole_head_bundle, BrightEngine())

    monkeypatch.setattr("mome_sdk.cli.Segmenter", made)
    return made()


def test_a_native_scan_is_reported_with_its_registration(
    tmp_path: Path, native_segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template itself, so that nothing has to be registered."""
    bundle = native_segmenter.bundle
    write_nifti(bundle.template.reorient("LPS"), tmp_path / "scan.nii.gz")
    out = tmp_path / "mask.nii.gz"
    words = ["predict", str(tmp_path / "scan.nii.gz"), "-o", str(out), "--report", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    jsonschema.validate(result, SCHEMA)
    made = result["provenance"]["preparation"]
    assert made["registration"] == "none: in the template's space already"
    assert "Look at this picture first" in (tmp_path / "mask.html").read_text()


def test_a_reference_is_registered_once_and_used_for_every_image(
    tmp_path: Path, native_segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = native_segmenter.bundle
    for name in ("t1", "flair", "t2"):
        write_nifti(bundle.template, tmp_path / f"{name}.nii.gz")
    inputs = [str(tmp_path / f"{name}.nii.gz") for name in ("flair", "t2")]
    reference = ["--reference", str(tmp_path / "t1.nii.gz")]
    assert main(["predict", *inputs, "-o", str(tmp_path / "out"), "--json", *reference]) == 0
    for line in capsys.readouterr().out.splitlines():
        made = json.loads(line)["provenance"]["preparation"]
        assert made["registration"] == "reference: none: in the template's space already"


def test_a_refused_scan_has_a_picture_and_no_mask(
    tmp_path: Path,
    native_segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of the template; a program that leaves it where it is stands for the registration."""
    monkeypatch.setattr(
        "mome_sdk.preprocess.register.registrations", lambda *_, **__: iter([np.eye(4)])
    )
    monkeypatch.setattr("mome_sdk.preprocess.skull_strip.is_installed", lambda: False)
    half = native_segmenter.bundle.template.crop((0, 100, 0), (197, 133, 189))
    write_nifti(half, tmp_path / "scan.nii.gz")
    out = tmp_path / "mask.nii.gz"
    assert main(["predict", str(tmp_path / "scan.nii.gz"), "-o", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "[brain.cut]" in said
    assert str(tmp_path / "mask_refused.png") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask_refused.png", "scan.nii.gz"]
    assert main(["predict", str(tmp_path / "scan.nii.gz"), "-o", str(out), "--force"]) == 0
    assert out.exists()
