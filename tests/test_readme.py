"""The README's code does what the README says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

import mome_sdk
from mome_sdk import bundle
from mome_sdk.architecture import Architecture
from mome_sdk.benchmarks.__main__ import command_line as benchmark_line
from mome_sdk.benchmarks.models import random_bundle
from mome_sdk.cli import main
from mome_sdk.options import parser
from mome_sdk.training.__main__ import command_line

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
GOLDEN = Path(__file__).parent / "golden"
SMALL = Architecture((1, 1), (1, 2), (1, 1), (1,), experts=2)
SHELL = [
    shlex.split(line, comments=True)
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick_demo(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes a second under the name of the demonstration, which takes twenty.

    What that finds, and that it does, is tested in test_cli.py, test_install.py, test_real_data.py.
    """
    data = tmp_path_factory.mktemp("data")
    random_bundle(data / "demo", SMALL, (160, 196, 160))
    (data / "template").symlink_to(bundle._DATA / "template")
    monkeypatch.setattr(bundle, "_DATA", data)


@pytest.fixture
def scan(folder: Path) -> Path:
    """The bundled example under the README's name for an image."""
    example = Path(mome_sdk.__file__).parent / "data" / "example" / "flair.nii.gz"
    return Path(shutil.copy(example, folder / "scan.nii.gz"))


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert {(words[0], words[1]) for words in SHELL} == {
        ("make", "demo"),  # `make fresh` and .ci/run
        ("make", "test"),
        ("pip", "install"),  # test_install.py
        ("mome", "predict"),  # below
        ("mome", "import"),
        ("cmake", "-S"),  # tests/csrc/test_embedding.py
        ("build/segment/segment", "mome.bundle"),
        ("mome", "export"),
        ("mome", "inspect"),
        ("mome", "train"),
        ("mome", "evaluate"),
        ("make", "bench"),  # as many of the suites as tests/benchmarks drives
        ("mome", "bench"),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("quick_demo")
@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_code_runs(code: str, scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"\d+ lesions, \d+\.\d mL\n", capsys.readouterr().out)
    assert scan.with_name("lesions.nii.gz").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_demo")
@pytest.mark.parametrize(
    "words",
    [w for w in SHELL if w[:3] == ["mome", "predict", "scan.nii.gz"] and "--model" not in w],
    ids=" ".join,
)
def test_predict_writes_mask_picture_and_report(words: list[str], scan: Path) -> None:
    assert main(words[1:]) == 0
    written = {path.name for path in scan.parent.iterdir()} - {scan.name}
    assert written == {"lesions.nii.gz", "lesions.png", "lesions.html"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_demo")
def test_a_folder_of_scans_gives_a_table(scan: Path) -> None:
    """The first of the two lines; what the second adds, Ray, is tested in test_batch.py."""
    words = next(w for w in SHELL if w[:3] == ["mome", "predict", "scans"])
    scan.with_name("scans").mkdir()
    scan.rename(scan.with_name("scans") / scan.name)
    assert main(words[1:]) == 0
    assert {path.name for path in Path("results").iterdir()} == {
        *("scan.nii.gz", "manifest.jsonl", "results.csv")
    }


@pytest.mark.slow
@pytest.mark.usefixtures("scan")
def test_an_export_is_made_looked_at_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    """The first block of its section, in order."""
    random_bundle(Path("mome.bundle"), SMALL, (160, 196, 160))
    block = [words for words in SHELL if "mome.onnx-fp16" in words]
    assert [words[1] for words in block] == ["export", "inspect", "predict"]
    for words in block:
        assert main(words[1:]) == 0
    assert "onnxruntime, fp16" in capsys.readouterr().out
    assert Path("lesions.nii.gz").is_file()


@pytest.mark.parametrize("words", [w for w in SHELL if w[:2] == ["mome", "export"]], ids=" ".join)
def test_export_commands_are_understood(words: list[str]) -> None:
    options = parser().parse_args(words[1:])
    assert options.check is not None or (options.target and options.output)


@pytest.mark.parametrize("words", [w for w in SHELL if "--ray" in w], ids=" ".join)
def test_ray_is_understood(words: list[str]) -> None:
    assert parser().parse_args(words[1:]).ray == int(words[-1])


@pytest.mark.parametrize("words", [w for w in SHELL if "study" in w], ids=" ".join)
def test_a_study_is_understood(words: list[str]) -> None:
    """What it does is tested in test_study.py."""
    assert parser().parse_args(words[1:]).format == ("nifti", "seg", "sr", "sc")


@pytest.mark.parametrize("words", [w for w in SHELL if w[1] in ("train", "evaluate")], ids=" ".join)
def test_training_commands_are_understood(words: list[str]) -> None:
    """What they do is tested in tests/training, on heads that take seconds."""
    options = command_line().parse_args(words[1:])
    assert callable(options.action)
    if words[1] == "train":
        assert (ROOT / options.config).is_file()


@pytest.mark.parametrize("words", [w for w in SHELL if w[:2] == ["mome", "bench"]], ids=" ".join)
def test_bench_commands_are_understood(words: list[str]) -> None:
    """What they do is tested in tests/benchmarks, on a tiny network."""
    assert benchmark_line().parse_args(words[2:]).suite == words[2]


@pytest.mark.parametrize("words", [w for w in SHELL if "fold_MoME" in w], ids=" ".join)
def test_import_makes_a_bundle(words: list[str], folder: Path) -> None:
    (run,) = (GOLDEN / "checkpoint" / "Dataset900_Synthetic").iterdir()
    for path in run.iterdir():
        (folder / path.name).symlink_to(path)
    assert main(words[1:]) == 0
    assert len(mome_sdk.ModelBundle.load(folder / words[-1]).modalities) == 5
