"""An sdist is enough: it builds anywhere, runs without an extra, and stays small."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT_MB = 250

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--sdist", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def environment(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment: the sdist, its default dependencies, nothing else."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", str(sdist)], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "setuptools", "pip"], check=True)
    return folder


def run(environment: Path, *command: str) -> str:
    """Standard output of a program of the environment, run where no source tree is near."""
    program = str(environment / "bin" / command[0])
    done = subprocess.run(
        [program, *command[1:]], cwd=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_the_sdist_holds_what_a_build_needs_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        paths = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {Path("LICENSE"), Path("setup.py"), Path("csrc/CMakeLists.txt")} <= paths
    assert {
        path.relative_to(ROOT)
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".hpp", ".cu", ".cmake", ".in", ".txt")
    } <= paths
    assert not {path for path in paths if path.suffix in (".so", ".pyc", ".o")}
    assert not {path for path in paths if path.parts[:1] in (("build",), ("demo-out",), (".venv",))}


def test_the_default_install_runs_without_an_extra(environment: Path) -> None:
    assert run(environment, "mome", "--version").startswith("mome")
    packages = {path.name for path in site_packages(environment).iterdir()}
    assert not packages & {"torch", "openvino", "onnx", "cmake", "pybind11"}
    assert {"export", "training", "benchmarks"} <= {
        path.name for path in (site_packages(environment) / "mome_sdk").iterdir()
    }


def test_the_default_install_finds_a_lesion(environment: Path, tmp_path: Path) -> None:
    run(environment, "mome", "demo", "-o", str(tmp_path / "out"))
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".gz", ".html", ".png"]


def test_the_default_install_is_of_bounded_size(environment: Path) -> None:
    sizes_mb = {
        path.name: sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file()) / 1e6
        for path in site_packages(environment).iterdir()
    }
    total_mb = sum(sizes_mb.values())
    for name, size_mb in sorted(sizes_mb.items(), key=lambda item: -item[1])[:8]:
        print(f"{size_mb:8.1f} MB  {name}")
    print(f"{total_mb:8.1f} MB  the default install (limit {SIZE_LIMIT_MB} MB)")
    assert total_mb <= SIZE_LIMIT_MB


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python3.*/site-packages")
    return folder
