"""The one pool of threads of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mome_sdk import _core
from mome_sdk.errors import InputError


def run_python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip()


def test_the_variable_sets_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_THREADS", "3")
    assert _core.default_threads() == 3
    monkeypatch.setenv("MOME_THREADS", "")
    assert 1 <= _core.default_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("value", ["0", "-1", "two", "2.5", " 2", "99999", "9" * 40])
def test_a_number_of_threads_that_cannot_be_used_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOME_THREADS", value)
    with pytest.raises(InputError, match=f"MOME_THREADS is '{value}'") as caught:
        _core.default_threads()
    assert caught.value.code == "argument.threads"


def test_the_affinity_mask_limits_the_threads() -> None:
    script = """if True:
        import os
        from mome_sdk import _core
        os.environ.pop("MOME_THREADS", None)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(_core.default_threads())
    """
    assert run_python(script) == "1"


def test_the_pool_starts_once_with_its_threads_and_serves_many_callers() -> None:
    script = """if True:
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        import time
        import numpy as np
        from mome_sdk import _core
        def threads():
            time.sleep(0.2)  # the system lists a thread a moment longer than it lives
            return len(list(Path("/proc/self/task").iterdir()))
        array = np.random.default_rng(0).standard_normal((40, 50, 60), np.float32)
        before = threads()
        once = _core.zscore(array)
        assert threads() == before + 4, (before, threads())
        with ThreadPoolExecutor(8) as pool:
            many = list(pool.map(_core.zscore, [array] * 64))
        assert threads() == before + 4, (before, threads())
        print(all((once == other).all() for other in many))
    """
    assert run_python(script, MOME_THREADS="5") == "True"


def test_a_forked_child_gets_threads_of_its_own() -> None:
    script = """if True:
        import os
        import numpy as np
        from pathlib import Path
        from mome_sdk import _core
        array = np.random.default_rng(0).standard_normal((40, 50, 60), np.float32)
        expected = _core.zscore(array)
        child = os.fork()
        if child == 0:
            same = (_core.zscore(array) == expected).all()
            threads = len(list(Path("/proc/self/task").iterdir()))
            os._exit(0 if same and threads == 3 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_python(script, MOME_THREADS="3", PYTHONWARNINGS="ignore") == "0"


def test_the_processor_is_described() -> None:
    features = _core.cpu_features()
    flags = Path("/proc/cpuinfo").read_text()
    for name, present in features.items():
        assert present == (f" {name.replace('avx512bf16', 'avx512_bf16')} " in flags), name
