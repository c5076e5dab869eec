"""Folders of cases: nothing is lost or done twice, whatever ends a run; the same in Ray."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest

import mome_sdk
from mome_sdk import batch as batch_module
from mome_sdk.batch import run
from mome_sdk.bundle import ModelBundle
from mome_sdk.cases import Case, collected_cases
from mome_sdk.cli import main
from mome_sdk.errors import MomeError
from mome_sdk.nifti import write_nifti
from mome_sdk.volume import Volume

SCHEMA = json.loads(
    (Path(mome_sdk.__file__).parent / "schemas" / "result.schema.json").read_text("utf-8")
)


def fill(folder: Path, count: int, size: int = 16) -> set[str]:
    """Scans on the model grid in two folders; one of twenty is broken: the names of those."""
    broken = set()
    for number in range(count):
        path = folder / f"{number % 2}" / f"s{number:03}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(number).normal(100.0, 20.0, (size, size, size))
        write_nifti(Volume(array, np.eye(4)), path)
        if number % 20 == 7:
            path.write_bytes(path.read_bytes()[: 100 + number])
            broken.add(path.relative_to(folder).as_posix())
    return broken


def cases_of(folder: Path, out: Path) -> list[Case]:
    return collected_cases(folder, out, probability=False, report=False)


def rows_of(out: Path) -> list[dict[str, str]]:
    """results.csv without the seconds."""
    with (out / "results.csv").open(newline="") as stream:
        return [
            {name: value for name, value in row.items() if not name.endswith("_s")}
            for row in csv.DictReader(stream)
        ]


def lines_of(out: Path) -> int:
    """Finished lines of the manifest, its first left out."""
    manifest = out / "manifest.jsonl"
    return max(0, manifest.read_bytes().count(b"\n") - 1) if manifest.exists() else 0


def check_complete(out: Path, count: int, broken: set[str]) -> None:
    """Every case once in the manifest and in the table, every mask there, nothing else."""
    rows = rows_of(out)
    assert lines_of(out) == len(rows) == count
    assert {row["input"] for row in rows if row["status"] == "failed"} == broken
    assert {row["code"] for row in rows if row["status"] == "failed"} == {"volume.truncated"}
    good = {row["input"] for row in rows if row["status"] == "done"}
    assert len(good) == count - len(broken)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {*good, "manifest.jsonl", "results.csv"}


def command(scans: Path, out: Path, bundle: ModelBundle, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "mome_sdk", "predict", str(scans), "-o", str(out), "--json"),
        *("--model", str(bundle.path), "--space", "model", "--threads", "1", *more),
    ]


def killed_after(lines: int, words: list[str], out: Path) -> None:
    """Run a command and kill it when the manifest has so many lines more."""
    start = lines_of(out)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and lines_of(out) < start + lines:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it had ended before"


def settings_of(bundle: ModelBundle, **more: Any) -> dict[str, Any]:
    return {"model": str(bundle.path), "space": "model", "threads": 1, **more}


@pytest.fixture
def predict(tiny_bundle: ModelBundle) -> Any:
    """`mome predict` with the tiny bundle, in this process."""
    fixed = ("--model", str(tiny_bundle.path), "--space", "model", "--threads", "1")
    return lambda *arguments: main(["predict", *map(str, arguments), *fixed])


def test_a_killed_run_is_resumed(tmp_path: Path, tiny_bundle: ModelBundle, predict: Any) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    broken = fill(scans, 40)
    killed_after(5, command(scans, out, tiny_bundle), out)
    assert 5 <= lines_of(out) < 40
    before = (out / "manifest.jsonl").read_bytes().rpartition(b"\n")[0]
    assert predict(scans, "-o", out) == 3
    assert (out / "manifest.jsonl").read_bytes().startswith(before)
    check_complete(out, 40, broken)


@pytest.mark.slow
def test_five_hundred_cases_survive_two_kills(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    broken = fill(scans, 500)
    assert len(broken) == 25
    draw = random.Random(0)
    words = command(scans, out, tiny_bundle)
    for _ in range(2):
        killed_after(draw.randrange(20, 200), words, out)
    assert lines_of(out) < 500
    last = subprocess.run(words, capture_output=True, text=True, check=False)
    assert last.returncode == 3
    assert "475 of 500 images are done, 25 were refused" in last.stderr
    check_complete(out, 500, broken)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_cases(
    tmp_path: Path, tiny_bundle: ModelBundle
) -> None:
    fill(tmp_path / "scans", 500)
    cases = cases_of(tmp_path / "scans", tmp_path / "out")
    process = psutil.Process()
    resident = {}
    for number, _ in enumerate(run(cases, tmp_path / "out", settings_of(tiny_bundle)), start=1):
        if number in (50, 500):
            resident[number] = process.memory_info().rss
    print(f"resident: {resident[50] / 1e6:.1f} MB at case 50, {resident[500] / 1e6:.1f} at 500")
    assert resident[500] < 1.03 * resident[50]


def test_a_second_run_does_what_has_changed(
    tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    (name,) = fill(scans, 8)
    assert predict(scans, "-o", out) == 3
    said = capsys.readouterr()
    assert "7 of 8 images are done, 1 were refused; 0 of them by an earlier run." in said.out
    assert f"mome: error [volume.truncated]: {name}: " in said.err
    assert said.out.count(" lesions, ") == 7
    assert predict(scans, "-o", out) == 3
    said = capsys.readouterr()
    assert said.out.startswith("7 of 8 images are done, 1 were refused; 8 of them by an earlier")
    assert said.err == ""
    good = scans / "0" / "s000.nii.gz"
    (scans / name).write_bytes(good.read_bytes())
    (out / "0" / "s002.nii.gz").unlink()
    assert predict(scans, "-o", out, "--json") == 0
    said = capsys.readouterr()
    records = [json.loads(line) for line in said.out.splitlines()]
    assert {record["input"] for record in records} == {
        str(scans / name),
        str(scans / "0" / "s002.nii.gz"),
    }
    for record in records:
        jsonschema.validate(record, SCHEMA)
    assert "8 of 8 images are done, 0 were refused; 6 of them by an earlier run." in said.err
    assert (out / name).read_bytes() == (out / "0" / "s000.nii.gz").read_bytes()


def test_a_broken_image_leaves_no_older_mask(tmp_path: Path, predict: Any) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    fill(scans, 2)
    assert predict(scans, "-o", out) == 0
    (scans / "0" / "s000.nii.gz").write_bytes(b"text")
    assert predict(scans, "-o", out) == 3
    assert not (out / "0" / "s000.nii.gz").exists()
    (scans / "1" / "s001.nii.gz").write_bytes(b"text")
    assert predict(scans, "-o", out) == 2, "all of them are refused"


def test_the_masks_are_those_of_single_calls(tmp_path: Path, predict: Any) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    fill(scans, 3)
    assert predict(scans, "-o", out) == 0
    for path in scans.rglob("*.nii.gz"):
        assert predict(path, "-o", tmp_path / "alone.nii.gz") == 0
        mask = (out / path.relative_to(scans)).read_bytes()
        assert mask == (tmp_path / "alone.nii.gz").read_bytes()


def test_a_bids_dataset_becomes_a_derivative(tmp_path: Path, predict: Any) -> None:
    fill(tmp_path / "scans", 1)
    image = tmp_path / "study" / "sub-1" / "anat" / "sub-1_FLAIR.nii.gz"
    image.parent.mkdir(parents=True)
    (tmp_path / "scans" / "0" / "s000.nii.gz").rename(image)
    out = tmp_path / "study" / "derivatives"
    for _ in range(2):
        assert predict(tmp_path / "study", "-o", out, "--report", "--probability") == 0
    stem = "sub-1_space-FLAIR_desc-lesion"
    assert {path.name for path in (out / "sub-1" / "anat").iterdir()} == {
        *(f"{stem}_mask.nii.gz", f"{stem}_probseg.nii.gz", f"{stem}_mask.png"),
        f"{stem}_mask.html",
    }
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "mome_sdk"
    (row,) = rows_of(out)
    assert row["output"] == f"sub-1/anat/{stem}_mask.nii.gz"


def test_a_description_that_is_there_is_left(tmp_path: Path, predict: Any) -> None:
    fill(tmp_path / "scans", 1)
    image = tmp_path / "study" / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    image.parent.mkdir(parents=True)
    (tmp_path / "scans" / "0" / "s000.nii.gz").rename(image)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_description.json").write_text("mine")
    assert predict(tmp_path / "study", "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "dataset_description.json").read_text() == "mine"


def test_names_that_are_no_text_stop_nothing(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    fill(tmp_path / "scans", 1)
    scan = tmp_path / "scans" / "0" / "s000.nii.gz"
    scan.rename(scan.with_name(os.fsdecode(b"caf\xe9.nii.gz")))
    out = tmp_path / "out"
    words = command(tmp_path / "scans", out, tiny_bundle, "--report")
    for options in (words, [word for word in words if word != "--json"]):
        done = subprocess.run(options, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (out / "0" / os.fsdecode(b"caf\xe9.nii.gz")).is_file()
    assert b"0/caf\xe9.nii.gz,0/caf\xe9.nii.gz,done" in (out / "results.csv").read_bytes()


def test_a_mask_that_cannot_be_written_is_tried_again(
    tmp_path: Path, tiny_bundle: ModelBundle, predict: Any
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    fill(scans, 4)
    out.mkdir()
    (out / "0").write_text("a file where a folder is needed")
    assert predict(scans, "-o", out) == 3
    assert [row["code"] for row in rows_of(out)] == ["argument.output"] * 2 + [""] * 2
    (out / "0").unlink()
    assert predict(scans, "-o", out) == 0
    check_outcomes = list(run(cases_of(scans, out), out, settings_of(tiny_bundle)))
    assert all(outcome.record is None for outcome in check_outcomes)


def test_options_that_led_nowhere_do_not_spoil_the_folder(tmp_path: Path, predict: Any) -> None:
    fill(tmp_path / "scans", 2)
    arguments = (tmp_path / "scans", "-o", tmp_path / "out")
    assert predict(*arguments, "--engine", "onnxruntime", "--device", "cuda:0") == 2
    assert predict(*arguments) == 0
    assert predict(*arguments, "--mirror", "all") == 2
    assert predict(*arguments, "--probability") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{dir}/scans", "{dir}/scans/0/s000.nii.gz"], "argument.input", "beside other inputs"),
        (["{dir}/scans/0/s000.nii.gz", "--ray", "2"], "argument.ray", "no folder or list"),
        (["{dir}/scans", "--ray", "0"], "argument.ray", "number of actors is 0"),
        (["{dir}/nothing"], "argument.input", "no file or folder"),
        (["{dir}/nothing.txt"], "argument.input", "cannot be read"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    code: str,
    text: str,
    tmp_path: Path,
    predict: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(tmp_path / "scans", 1)
    filled = [word.format(dir=tmp_path) for word in arguments]
    assert predict(*filled, "-o", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"[{code}]" in line
    assert text in line
    assert not (tmp_path / "out").exists()


def test_without_ray_its_extra_is_named(
    tmp_path: Path, predict: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fill(tmp_path / "scans", 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert predict(tmp_path / "scans", "-o", tmp_path / "out", "--ray", "2") == 2
    assert 'pip install "mome-sdk[ray]"' in capsys.readouterr().err


def test_a_ray_that_does_not_answer_is_named(
    tmp_path: Path, predict: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fill(tmp_path / "scans", 1)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unheard.getsockname()[1]}")
        assert predict(tmp_path / "scans", "-o", tmp_path / "out", "--ray", "1") == 2
    said = capsys.readouterr().err
    assert "[engine.ray]" in said
    assert "Connection refused" in said


@pytest.mark.parametrize(
    ("resource", "actors", "nodes", "share"),
    [
        ("CPU", 2, [2.0], 1.0),
        ("CPU", 1, [16.0], 16.0),
        ("CPU", 3, [2.0], 0.666),
        ("CPU", 3, [16.0, 8.0, 0.0], 4.0),
        ("CPU", 5, [16.0], 3.0),
        ("GPU", 4, [2.0, 2.0], 1.0),
        ("GPU", 8, [1.0, 2.0], 0.25),
    ],
)
def test_actors_share_a_machine_evenly(
    resource: str, actors: int, nodes: list[float], share: float
) -> None:
    machines = [{"Alive": True, "Resources": {resource: n} if n else {}} for n in nodes]
    machines.append({"Alive": False, "Resources": {resource: 0.1}})
    assert batch_module._share_of(resource, actors, machines) == share


def test_a_device_that_no_machine_has_is_refused() -> None:
    machines = [{"Alive": True, "Resources": {"CPU": 4.0}}]
    with pytest.raises(MomeError, match="No machine of Ray has a GPU") as refusal:
        batch_module._share_of("GPU", 1, machines)
    assert refusal.value.code == "engine.device"


@pytest.mark.slow
def test_two_actors_write_the_same_bytes_though_one_is_killed(
    tmp_path: Path, tiny_bundle: ModelBundle, predict: Any
) -> None:
    scans, alone, shared = tmp_path / "scans", tmp_path / "alone", tmp_path / "shared"
    broken = fill(scans, 24, size=32)
    step = ("--step", "0.34")  # a quarter of a second a case
    assert predict(scans, "-o", alone, *step) == 3
    words = command(scans, shared, tiny_bundle, "--ray", "2", *step)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and lines_of(shared) < 4:
            time.sleep(0.05)
        actors = actors_of(process.pid)
        assert len(actors) == 2
        actors[0].kill()
        said, errors = process.communicate()
    assert process.returncode == 3, errors.decode()
    records = [json.loads(line) for line in said.splitlines()]
    assert len(records) == 24, "nothing but JSON on standard output"
    check_complete(shared, 24, broken)
    assert rows_of(shared) == rows_of(alone)
    for path in alone.rglob("*.nii.gz"):
        assert (shared / path.relative_to(alone)).read_bytes() == path.read_bytes()


def actors_of(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if child.name().startswith("ray::MapWorker")
    ]


class Deadly(Case):
    """Ends every process that unpacks it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


class Defective(Case):
    """Cannot be unpacked."""

    def __reduce__(self) -> Any:
        return int, ("x",)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray as a caller starts it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray[data]")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def like(case: Case, kind: type[Case]) -> Case:
    return kind(case.name, case.image, case.mask)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # Ray's own
def test_a_case_that_kills_its_actor_is_named_and_the_rest_is_done(
    tmp_path: Path, tiny_bundle: ModelBundle, ray: Any
) -> None:
    fill(tmp_path / "scans", 6)
    cases = cases_of(tmp_path / "scans", tmp_path / "out")
    cases[2] = like(cases[2], Deadly)
    outcomes = list(run(cases, tmp_path / "out", settings_of(tiny_bundle), ray=2))
    assert len(outcomes) == 6
    failed = {o.case.name: o.row["code"] for o in outcomes if o.row["status"] == "failed"}
    assert failed == {cases[2].name: "engine.actor-lost"}
    assert ray.is_initialized(), "what the caller started is left running"
    good = cases_of(tmp_path / "scans", tmp_path / "out")
    (again,) = [o for o in run(good, tmp_path / "out", settings_of(tiny_bundle)) if o.record]
    assert (again.case.name, again.row["status"]) == (cases[2].name, "done")


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.usefixtures("ray")
def test_what_is_wrong_for_every_case_stops_a_run_in_ray(
    tmp_path: Path, tiny_bundle: ModelBundle
) -> None:
    fill(tmp_path / "scans", 2)
    cases = cases_of(tmp_path / "scans", tmp_path / "out")
    settings = settings_of(tiny_bundle, engine="onnxruntime", precision="fp8")
    with pytest.raises(MomeError, match="fp8") as refusal:
        list(run(cases, tmp_path / "out", settings, ray=1))
    assert refusal.value.code == "engine.precision"
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        list(run([like(cases[0], Defective)], tmp_path / "out", settings_of(tiny_bundle), ray=1))
