"""The queue: durable, once, and with an end."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from mome_sdk.errors import DicomError, PeerError
from mome_sdk.pacs.jobs import JobQueue
from mome_sdk.pacs.settings import RetryConfig

RETRY = RetryConfig(attempts=3, first_s=0.0, last_s=0.0)


@pytest.fixture
def queue(tmp_path: Path):
    made = JobQueue(tmp_path)
    yield made
    made.close()


def filled(queue: JobQueue, images: int = 3, study: str = "1.2") -> int:
    for number in range(images):
        assert queue.receive(study, f"{study}.{number}", b"image %d" % number, "SCANNER")
    number = queue.complete(study, images)
    assert number is not None
    return number


def test_a_job_goes_through_its_states(queue):
    number = filled(queue)
    job = queue.lease()
    assert (job.id, job.state, job.source) == (number, "complete", "dicom")
    assert queue.lease() is None  # leased
    assert [path.read_bytes() for path in queue.files(job)] == [b"image 0", b"image 1", b"image 2"]
    assert queue.segmented(job, {"seg": b"s", "sr": b"r"}, {"lesions": 2})
    assert queue.undelivered(job, ["A", "B"]) == [
        ("A", "seg"), ("A", "sr"), ("B", "seg"), ("B", "sr"),
    ]  # fmt: skip
    queue.sent(job, "A", "seg")
    assert ("A", "seg") not in queue.undelivered(job, ["A", "B"])
    queue.delivered(job)
    assert queue.counts()["delivered"] == 1
    assert queue.get(number).said == {"lesions": 2}


def test_the_same_images_make_no_second_job(queue):
    filled(queue)
    for number in range(3):
        assert not queue.receive("1.2", f"1.2.{number}", b"image %d" % number, "SCANNER")
    assert queue.pending() == []
    assert queue.receive("1.2", "1.2.9", b"image 9", "SCANNER")
    ((study, peer, images, _, _),) = queue.pending()
    assert (study, peer, images) == ("1.2", "SCANNER", 4)


def test_more_images_supersede_a_job_that_has_not_ended(queue):
    first = filled(queue)
    job = queue.lease()
    queue.receive("1.2", "1.2.9", b"image 9", "SCANNER")
    assert len(queue.files(job)) == 3  # its own, whatever came later
    second = queue.complete("1.2", 4)
    assert queue.get(first).state == "superseded"
    assert not queue.segmented(job, {"seg": b"s"}, {})
    assert queue.lease().id == second


def test_an_image_is_not_taken_from_its_study_by_another_one(queue):
    queue.receive("1.2", "1.2.0", b"image", "SCANNER")
    queue.receive("1.3", "1.2.0", b"other", "SCANNER")
    assert [(study, images) for study, _, images, *_ in queue.pending()] == [("1.2", 1), ("1.3", 1)]
    assert queue.receive("1.2", "1.2.0", b"corrected", "SCANNER")
    assert queue.images_of("1.2") == 1


def test_a_study_that_changed_meanwhile_is_not_complete(queue):
    queue.receive("1.2", "1.2.0", b"image", "SCANNER")
    assert queue.complete("1.2", 2) is None
    assert queue.counts()["received"] == 1


def test_retries_end_and_a_failed_job_can_be_restarted(queue):
    number = filled(queue)
    error = PeerError("peer.unreachable", "Nobody.", retryable=True)
    for attempt in range(3):
        job = queue.lease()
        assert job.attempts == attempt
        state = queue.failed(job, error, RETRY, again=True)
    assert state == "failed"
    assert queue.lease() is None
    assert queue.restart(number)
    assert not queue.restart(number)
    assert queue.lease().attempts == 0


def test_an_error_that_no_retry_helps_ends_a_job_at_once(queue):
    filled(queue)
    job = queue.lease()
    assert queue.failed(job, DicomError("dicom.x", "Bad."), RETRY, again=False) == "failed"
    assert queue.get(job.id).message == "Bad."


def test_the_delay_doubles_up_to_a_limit():
    retry = RetryConfig(attempts=9, first_s=5, last_s=60)
    assert [retry.delay_s(n) for n in range(1, 7)] == [5, 10, 20, 40, 60, 60]


def test_a_job_waits_for_its_delay(queue):
    filled(queue)
    retry = RetryConfig(attempts=3, first_s=0.3, last_s=1)
    queue.failed(queue.lease(), PeerError("peer.x", "No.", retryable=True), retry, again=True)
    assert queue.lease() is None
    time.sleep(0.35)
    assert queue.lease() is not None


def test_after_a_crash_leases_are_gone_and_files_without_a_row_too(tmp_path):
    queue = JobQueue(tmp_path)
    number = filled(queue)
    assert queue.lease().id == number
    orphan = tmp_path / "files" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"never acknowledged")
    kept = sorted(path for path in (tmp_path / "files").glob("*/*") if path != orphan)
    again = JobQueue(tmp_path)  # the first one did not end well
    job = again.lease()
    assert (job.id, job.attempts) == (number, 1)  # what ends the process has an end, too
    assert not orphan.exists()
    assert sorted((tmp_path / "files").glob("*/*")) == kept
    mode = sqlite3.connect(tmp_path / "queue.sqlite").execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal",)
    queue.close()
    again.close()


def test_an_upload_is_a_job(queue):
    number = uploaded(queue, b"PK\x03\x04")
    assert uploaded(queue, b"PK\x03\x04") == number
    assert queue.files(queue.get(number))[0].read_bytes() == b"PK\x03\x04"


def uploaded(queue: JobQueue, data: bytes) -> int:
    path = queue.new_file()
    path.write_bytes(data)
    return queue.upload(path, "zip")


def test_files_of_what_ended_go_and_rows_stay(queue):
    number = filled(queue)
    job = queue.lease()
    queue.segmented(job, {"seg": b"s"}, {})
    queue.delivered(job)
    assert queue.sweep(3600) == 0
    time.sleep(0.01)
    assert queue.sweep(0) == 4  # three images, one result
    assert queue.get(number).state == "delivered"
    assert queue.receive("1.2", "1.2.0", b"image 0", "SCANNER")  # its file is back


def test_a_late_slice_of_a_study_whose_files_are_gone_asks_for_the_whole_study(queue):
    filled(queue)
    job = queue.lease()
    queue.segmented(job, {"seg": b"s"}, {})
    queue.delivered(job)
    time.sleep(0.01)
    queue.sweep(0)
    queue.receive("1.2", "1.2.9", b"image 9", "SCANNER")
    late = queue.complete("1.2", 4)
    with pytest.raises(DicomError, match="3 of 4 files") as caught:
        queue.files(queue.lease())
    queue.failed(queue.get(late), caught.value, RETRY, again=False)
    for number in range(3):
        queue.receive("1.2", f"1.2.{number}", b"image %d" % number, "SCANNER")
    assert queue.complete("1.2", 4) == late
    assert len(queue.files(queue.lease())) == 4


def test_files_that_somebody_waits_for_are_not_swept(queue):
    number = filled(queue)
    assert queue.sweep(0) == 0
    job = queue.lease()
    queue.failed(job, DicomError("dicom.x", "Bad."), RETRY, again=False)
    time.sleep(0.01)
    assert queue.sweep(0) == 0  # it can be restarted
    assert queue.get(number).state == "failed"


def test_an_upload_whose_results_are_gone_is_done_again(queue):
    number = uploaded(queue, b"PK\x03\x04")
    job = queue.lease()
    queue.segmented(job, {"seg": b"s"}, {})
    queue.delivered(job)
    time.sleep(0.01)
    assert queue.sweep(0) == 2
    assert uploaded(queue, b"PK\x03\x04") == number
    assert queue.lease().state == "complete"


def test_a_full_disk_is_noticed(tmp_path):
    queue = JobQueue(tmp_path, free_mb=2**30)
    assert not queue.has_room()
    queue.close()
