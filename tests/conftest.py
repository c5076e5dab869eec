"""What the tests share. A skip names what is missing; MOME_REQUIRE=all makes a failure of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from mome_sdk.architecture import Architecture
from mome_sdk.bundle import ModelBundle, create_bundle
from mome_sdk.export.graph import write_graph
from mome_sdk.exported import ExportedModel
from mome_sdk.segmenter import Segmenter
from phantom import BrightEngine

TINY = Architecture((4, 8, 8), (1, 2, 2), (2, 2, 2), (2, 2))

# Drawn from the test's name, not from a clock or an earlier run: every machine sees the same cases.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real scans that MOME_TEST_DATA names."""
    folder = os.environ.get("MOME_TEST_DATA")
    if not folder:
        pytest.skip(
            "MOME_TEST_DATA is not set: it names the folder of real scans (ms_patient19, ...)."
        )
    if not Path(folder, "prepared").is_dir():
        pytest.skip(f"MOME_TEST_DATA={folder} has no folder `prepared`.")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def require_program() -> Callable[[str], Path]:
    """A function: the path of a program, or a skip that names it."""

    def find(name: str) -> Path:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"The program `{name}` is not installed.")
        return Path(path)

    return find


@pytest.fixture(scope="session")
def require_root() -> None:
    """Skip where the test may not mount file systems or change users."""
    if os.geteuid() != 0:
        pytest.skip("This test mounts file systems or changes users: run it as root.")


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights at the scale that keeps a signal's size; nothing is zero or one by default."""
    draw = np.random.default_rng(seed).normal
    return {
        name: draw(
            1.0 if name.endswith("norm.weight") else 0.0,
            0.1 if len(shape) < 2 else np.sqrt(2.0 / np.prod(shape[1:])),
            shape,
        ).astype(np.float32)
        for name, shape in architecture.tensor_shapes().items()
    }


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A random MoME of 3 stages and 4 features, window 16^3, that every engine runs."""
    return create_bundle(
        tmp_path_factory.mktemp("bundles") / "tiny",
        TINY,
        random_tensors(TINY),
        name="tiny",
        patch=(16, 16, 16),
        blend="exact",
        training={"source": "random numbers"},
        graph=write_graph,
    )


@pytest.fixture(scope="session")
def onnx_export(
    tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> ExportedModel:
    """The tiny bundle for ONNX runtimes: float32, any batch."""
    from mome_sdk.export.targets import export_bundle  # loads PyTorch, which few tests need

    return export_bundle(tiny_bundle, tmp_path_factory.mktemp("exports") / "onnx", "onnx")


@pytest.fixture(scope="session")
def fp16_export(
    tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> ExportedModel:
    """The same in half precision, two windows a call, experts apart."""
    from mome_sdk.export.targets import export_bundle  # as above

    out = tmp_path_factory.mktemp("exports") / "fp16"
    return export_bundle(tiny_bundle, out, "onnx", precision="fp16", experts="separate", batch=2)


@pytest.fixture(scope="session")
def whole_head_bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The same, whose one window is the whole model grid."""
    return create_bundle(
        tmp_path_factory.mktemp("bundles") / "whole",
        TINY,
        random_tensors(TINY),
        name="whole head",
        patch=(160, 196, 160),
        blend="exact",
        training={"source": "random numbers"},
    )


@pytest.fixture
def bright_segmenter(whole_head_bundle: ModelBundle) -> Segmenter:
    """Calls bright voxels lesion, of any image in the space of MNI152."""
    return Segmenter(whole_head_bundle, BrightEngine(), space="mni")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks on DICOM files without a process for each: to start one takes longer than the rest."""
    from pydicom import config

    from mome_sdk.dicom import parse

    def direct(task: str, folder: Path, limits: object, **request: Any) -> dict[str, Any]:
        if "output" in request:
            request["output"] = str(folder / request["output"])
        return parse.TASKS[task](limits=limits, **request)

    monkeypatch.setattr("mome_sdk.dicom.series.run_limited", direct)
    with config.disable_value_validation():
        yield


def pytest_configure() -> None:
    required = os.environ.get("MOME_REQUIRE", "")
    if required not in ("", "all"):
        raise pytest.UsageError(f"MOME_REQUIRE is `{required}`; it can be `all` or unset.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in item.keywords:
        _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _fail_if_required(report)
    return report


def _fail_if_required(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("MOME_REQUIRE") == "all":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"MOME_REQUIRE=all: {reason}"
