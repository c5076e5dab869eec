"""`mome serve` as a program: with the demonstration model, alone in its folder, until a signal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mome_sdk.errors import InputError, PeerError
from mome_sdk.pacs.service import Service
from pacs.conftest import NODE, ask, wait_until
from pacs.node import BrightSegmenter

SERVE = [sys.executable, "-c", "import sys; from mome_sdk.cli import main; sys.exit(main())"]


def started(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*SERVE, "serve", "config.toml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_it_runs_until_a_signal_and_says_nothing(configure, tmp_path):
    configure()
    process = started(tmp_path)
    assert wait_until(lambda: process.poll() is not None or is_ready(), 60)
    second = started(tmp_path)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert b"[argument.config]: Another node works in the folder" in said
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 0


def is_ready() -> bool:
    try:
        return ask("/readyz")[0] == 200
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_an_address_in_use_is_said_in_one_line(configure, tmp_path):
    configure()
    with socket.create_server(("127.0.0.1", NODE)):
        process = started(tmp_path)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith(b"mome: error [engine.address]: The node cannot listen:")
    assert said.count(b"\n") == 1


def test_two_nodes_do_not_share_a_folder(configure):
    first = Service(configure(), segmenter=BrightSegmenter)
    with pytest.raises(InputError, match="Another node works in the folder"):
        Service(configure(), segmenter=BrightSegmenter)
    first.queue.close()
    first._alone.close()
    again = Service(configure(), segmenter=BrightSegmenter)
    again.queue.close()
    again._alone.close()


def test_a_job_that_took_the_node_down_too_often_ends(configure):
    config = configure(("attempts = 6", "attempts = 2"))
    for _ in range(2):
        service = Service(config, segmenter=BrightSegmenter)
        if not service.queue.latest():
            service.queue.receive("1.2", "1.2.0", b"image", "SCANNER")
            service.queue.complete("1.2", 1)
        assert service.queue.lease() is not None  # and the process dies
        service.queue.close()
        service._alone.close()
    service = Service(config, segmenter=BrightSegmenter)
    service.worker.work(service.queue.lease())
    (job,) = service.queue.latest()
    assert (job.state, job.code) == ("failed", "job.crashed")
    assert service.queue.restart(job.id)
    service.queue.close()
    service._alone.close()


def test_the_time_that_the_node_was_down_is_not_quiet(configure):
    """Half a study came, the node was killed, the sender is about to send the rest."""
    config = configure(("quiet_s = 1.5", "quiet_s = 0.4"))
    service = Service(config, segmenter=BrightSegmenter)
    service.queue.receive("1.2", "1.2.0", b"image", "SCANNER")
    service.queue.close()
    service._alone.close()
    time.sleep(0.5)
    service = Service(config, segmenter=BrightSegmenter)
    service.look()
    assert service.queue.latest() == []
    time.sleep(0.5)
    service.look()
    assert len(service.queue.latest()) == 1
    service.queue.close()
    service._alone.close()


def test_a_study_that_could_not_be_fetched_is_asked_for_again(configure, monkeypatch):
    """A refusal of one study holds up no other; what brought nothing new is not asked for twice."""
    config = configure(("sends = true", "sends = true\nbackfill_days = 1"))
    service = Service(config, segmenter=BrightSegmenter)
    refused, asked = {"1.2"}, []

    def fetch(study: str, *_: object) -> int:
        asked.append(study)
        if study in refused:
            raise PeerError("peer.status", "No.", retryable=True)
        return 0

    monkeypatch.setattr("mome_sdk.pacs.sender.recent_studies", lambda *_: ["1.2", "1.3"])
    monkeypatch.setattr("mome_sdk.pacs.sender.images_of_study", lambda *_: 3)
    monkeypatch.setattr("mome_sdk.pacs.sender.fetch_study", fetch)
    looks = [service.backfill.look() for _ in range(2)]
    assert (looks, asked) == ([2, 1], ["1.2", "1.3", "1.2"])
    refused.clear()
    looks = [service.backfill.look() for _ in range(2)]
    assert (looks, asked) == ([1, 0], ["1.2", "1.3", "1.2", "1.2"])
    service.queue.receive("1.2", "1.2.0", b"image", "SCANNER")
    assert service.backfill.look() == 1  # one of three came: worth another try
    said = Path("node", "logs", "audit.jsonl").read_text()
    assert said.count("backfill-failed") == 2
    service.queue.close()
    service._alone.close()


def test_a_study_waits_for_announced_images_and_not_for_ever(configure, monkeypatch):
    config = configure(
        ("sends = true", "sends = true\nanswers = true"),
        ("quiet_s = 1.5", "quiet_s = 0.0\nwait_s = 0.5"),
    )
    service = Service(config, segmenter=BrightSegmenter)
    asked = []

    def answer(study: str, *_: object) -> int:
        asked.append(study)
        return 3

    monkeypatch.setattr("mome_sdk.pacs.sender.images_of_study", answer)
    service.queue.receive("1.2", "1.2.0", b"image", "SCANNER")
    service.look()
    service.look()
    assert service.queue.latest() == []
    assert asked == ["1.2"]  # once for each number of images
    time.sleep(0.6)
    service.look()
    assert [job.state for job in service.queue.latest()] == ["complete"]
    service.queue.close()
    service._alone.close()
