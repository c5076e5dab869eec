"""Senders, kills and restarts: every study ends with one result set, none lost, none twice.

The short version runs with the slow tests. `MOME_SOAK=full pytest tests/pacs/test_soak.py -s` is
the whole: 200 studies of 4 senders, 20 kills, 3 restarts of Orthanc.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import threading
import time
from collections import Counter

import pydicom
import pytest

from pacs.conftest import NodeProcess, ask, name_nobody, small_study, storescu, wait_until

FULL = os.environ.get("MOME_SOAK") == "full"
STUDIES, SENDERS, KILLS, RESTARTS = (200, 4, 20, 3) if FULL else (20, 4, 4, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600 if FULL else 300)
def test_every_study_has_one_result_set(orthanc, configure, tmp_path):
    configure(("attempts = 6", "attempts = 200"))
    node, draw = NodeProcess(tmp_path), random.Random(7)
    node.start()
    folders = [small_study(tmp_path / "studies" / str(n), n) for n in range(STUDIES)]
    left = list(folders)
    lock, failed = threading.Lock(), []

    def send() -> None:
        while True:
            with lock:
                if not left:
                    return
                folder = left.pop()
            for _ in range(100):  # as a modality does: until all of it was acknowledged
                if storescu(folder) == 0:
                    break
                time.sleep(0.5)
            else:
                failed.append(folder)

    senders = [threading.Thread(target=send) for _ in range(SENDERS)]
    for each in senders:
        each.start()
    restarts = 0
    for number in range(KILLS):
        time.sleep(draw.uniform(2.0, 6.0))
        node.kill()
        node.start()
        if restarts < RESTARTS and number % max(1, KILLS // RESTARTS) == 0:
            orthanc.stop()
            time.sleep(draw.uniform(0.2, 2.0))
            orthanc.start()
            restarts += 1
    for each in senders:
        each.join(timeout=600)
    assert not failed

    def all_there() -> bool:
        found = orthanc.results()
        return all(len(found.get(name, [])) >= STUDIES for name in ("SEG", "SR", "OT"))

    assert wait_until(all_there, 900 if FULL else 120), {
        name: len(v) for name, v in orthanc.results().items()
    }
    time.sleep(5)  # would there be more?
    counts = Counter()
    for name, instances in orthanc.results().items():
        for instance in instances:
            header = pydicom.dcmread(io.BytesIO(orthanc.file(instance)), stop_before_pixels=True)
            counts[str(header.StudyInstanceUID), name] += 1
    studies = {study for study, _ in counts}
    print(f"\n{STUDIES} studies, {SENDERS} senders, {KILLS} kills, {restarts} Orthanc restarts:")
    print(f"{len(studies)} studies with results, {sum(counts.values())} objects")
    assert len(counts) == 3 * STUDIES, "none is lost"
    assert set(counts.values()) == {1}, "none is there twice"
    states = dict(re.findall(r'mome_jobs{state="(\w+)"} (\d+)', ask("/metrics")[1].decode()))
    print(f"jobs: {states}")
    assert int(states["delivered"]) == STUDIES
    assert {states[name] for name in ("received", "complete", "segmented", "failed")} == {"0"}
    name_nobody(ask("/metrics")[1], "metrics")
    node.stop()
    shutil.rmtree(tmp_path / "studies")
