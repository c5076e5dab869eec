"""From a study that a modality sends to results in the PACS, with a real Orthanc and DCMTK."""

from __future__ import annotations

import io
import json
import time
from datetime import date
from pathlib import Path

import pydicom
import pytest

from dicom_files import PATIENT_ID, PATIENT_NAME, classic, save
from mome_sdk.pacs import dicomweb, sender
from mome_sdk.pacs.settings import DicomWebConfig
from pacs.conftest import CONFIG, DICOM, HTTP, small_study, storescu, wait_until
from phantom import grid, phantom

pytestmark = pytest.mark.slow

RECEIVES = f"port = {DICOM}\nreceives = true"
WEB = f'\n[dicomweb]\nurl = "http://127.0.0.1:{HTTP}/dicom-web"\n'


def finished(service, count: int = 1, state: str = "delivered") -> bool:
    return service.queue.counts()[state] == count


@pytest.mark.parametrize("way", ["C-STORE", "STOW"])
def test_a_study_comes_back_as_seg_sr_and_capture(orthanc, serve, configure, whole_study, way):
    """Acceptance 1. A second time nothing new is made; nothing names the patient."""
    changes = []
    if way == "STOW":
        changes = [(RECEIVES, f"port = {DICOM}"), (CONFIG[-20:], CONFIG[-20:] + WEB)]
    service = serve(configure(*changes))
    assert storescu(whole_study) == 0
    assert wait_until(lambda: finished(service), 60), service.queue.latest()
    found = orthanc.results()
    assert {modality: len(instances) for modality, instances in found.items()} == {
        **{"SEG": 1, "SR": 1},
        "OT": 1,
    }
    (seg,) = (pydicom.dcmread(io.BytesIO(orthanc.file(i))) for i in found["SEG"])
    (report,) = (pydicom.dcmread(io.BytesIO(orthanc.file(i))) for i in found["SR"])
    source = pydicom.dcmread(next((whole_study / "FLAIR").iterdir()), stop_before_pixels=True)
    assert seg.StudyInstanceUID == report.StudyInstanceUID == source.StudyInstanceUID
    referenced = seg.ReferencedSeriesSequence[0].SeriesInstanceUID
    assert referenced == source.SeriesInstanceUID
    assert int(seg.pixel_array.sum()) > 5
    (job,) = service.queue.latest()
    assert job.said["modality"] == "FLAIR"
    assert len(job.said["considered"]) == 8  # seven series, one of two stacks
    # Sent again, it is the same study: nothing happens.
    assert storescu(whole_study) == 0
    time.sleep(3)
    assert finished(service)
    assert orthanc.results() == found
    logs = (Path("node") / "logs" / "audit.jsonl").read_text()
    metrics = service.api._metrics().body.decode()
    for secret in (PATIENT_ID, PATIENT_NAME, "Zora", str(source.StudyInstanceUID)):
        assert secret not in logs
        assert secret not in metrics
    events = [json.loads(line)["event"] for line in logs.splitlines()]
    for event in ("started", "received", "complete", "segmented", "delivered"):
        assert event in events


def test_late_slices_supersede(orthanc, serve, configure, tmp_path):
    service = serve(configure())
    folder = small_study(tmp_path / "study", 1)
    slices = sorted(folder.iterdir())
    for late in slices[-4:]:
        late.rename(tmp_path / late.name)
    assert storescu(folder) == 0
    assert wait_until(lambda: finished(service), 30)
    (tmp_path / "late").mkdir()
    for late in slices[-4:]:
        (tmp_path / late.name).rename(tmp_path / "late" / late.name)
    assert storescu(tmp_path / "late") == 0
    assert wait_until(lambda: finished(service, 2), 30)
    counts = [job.said["volume_ml"] for job in service.queue.latest()]
    assert len(counts) == 2
    assert len(orthanc.results()["SR"]) == 2  # of different images: two results


def test_a_dead_pacs_is_tried_again_and_in_the_end_given_up(orthanc, serve, configure, tmp_path):
    """Every job that failed can be started again by one call."""
    service = serve(configure(("attempts = 6", "attempts = 2")))
    orthanc.stop()
    assert storescu(small_study(tmp_path / "study", 1)) == 0
    assert wait_until(lambda: finished(service, state="failed"), 40), service.queue.latest()
    (job,) = service.queue.latest()
    assert job.code == "peer.unreachable"
    orthanc.start()
    assert service.queue.restart(job.id)
    assert wait_until(lambda: finished(service), 30)
    assert {name: len(v) for name, v in orthanc.results().items()} == {"SEG": 1, "SR": 1, "OT": 1}


def test_a_study_that_cannot_be_read_fails_at_once(orthanc, serve, configure, tmp_path):
    """Gaps between slices: no attempt after the first, and a reason."""
    service = serve(configure())
    folder = small_study(tmp_path / "study", 1)
    sorted(folder.iterdir())[5].unlink()
    assert storescu(folder) == 0
    assert wait_until(lambda: finished(service, state="failed"), 30), service.queue.latest()
    (job,) = service.queue.latest()
    assert (job.code, job.attempts) == ("dicom.slice-gap", 1)
    assert orthanc.results() == {}


def test_a_peer_is_asked_how_many_images_there_are(orthanc, serve, configure, tmp_path):
    """With the count of C-FIND a study is complete long before it is quiet for long enough."""
    folder = small_study(tmp_path / "study", 1)
    config = configure(
        ("quiet_s = 1.5", "quiet_s = 600.0"),
        ("port = 104\nsends = true", f"port = {DICOM}\nsends = true\nanswers = true"),
        ('aet = "SCANNER"', 'aet = "ORTHANC2"'),
        ('aet = "ORTHANC"\n', 'aet = "ORTHANC"\nsends = true\nanswers = true\n'),
    )
    service = serve(config)
    assert storescu(folder, "-aec", "ORTHANC", port=DICOM) == 0
    (study,) = orthanc.get("/studies")
    uid = orthanc.get(f"/studies/{study}")["MainDicomTags"]["StudyInstanceUID"]
    peer = config.peers[0]
    images = len(list(folder.iterdir()))
    assert sender.images_of_study(uid, peer, config.node) == images
    assert sender.fetch_study(uid, peer, config.node) == images  # C-MOVE to us
    assert wait_until(lambda: finished(service), 40), service.queue.counts()
    web = DicomWebConfig(f"http://127.0.0.1:{HTTP}/dicom-web")
    assert sum(len(v) for v in orthanc.results().values()) == 3  # which do not count:
    assert sender.images_of_study(uid, peer, config.node) == images
    assert sender.fetch_study(uid, peer, config.node) == images
    assert dicomweb.images_of_study(uid, web) == images
    files = list(dicomweb.fetch_study(uid, web))
    assert len(files) == images
    assert {pydicom.dcmread(io.BytesIO(data)).Modality for data in files} == {"MR"}


@pytest.mark.parametrize("way", ["C-MOVE", "WADO"])
def test_what_never_came_is_fetched(orthanc, serve, configure, tmp_path, way):
    """The PACS has two studies of today, one of last year, and half of one is here already."""
    today = f"{date.today():%Y%m%d}"
    for number, day in enumerate((today, today, "20200102"), start=1):
        volume = phantom(where=grid(12.0).reorient("LPS"))
        study = classic(volume, "FLAIR", study=f"study-{number}", StudyDate=day)
        save(study, tmp_path / str(number))
        assert storescu(tmp_path / str(number), "-aec", "ORTHANC", port=DICOM) == 0
    if way == "C-MOVE":
        changes = [('aet = "ORTHANC"\n', 'aet = "ORTHANC"\nsends = true\nbackfill_days = 2\n')]
    else:
        changes = [(CONFIG[-20:], CONFIG[-20:] + WEB + "receives = false\nbackfill_days = 2\n")]
    half = tmp_path / "half"
    half.mkdir()
    for path in sorted((tmp_path / "1").iterdir())[::2]:
        path.rename(half / path.name)
    service = serve(configure(("quiet_s = 1.5", "quiet_s = 3"), *changes))
    assert storescu(half) == 0
    assert wait_until(lambda: finished(service, 2), 60), service.queue.counts()
    assert service.backfill.look() == 0  # and then there is nothing more to fetch
    assert {job.said["lesions"] for job in service.queue.latest()} == {1}
    assert {name: len(v) for name, v in orthanc.results().items()} == {"SEG": 2, "SR": 2, "OT": 2}


def test_a_peer_promises_to_keep_what_it_was_sent(orthanc, serve, configure, tmp_path):
    """Storage commitment: asked for, and answered by a connection of Orthanc to us."""
    asked = 'aet = "ORTHANC"\ncommits = true\n'
    service = serve(configure(('aet = "ORTHANC"\n', asked), ("[http]", "commit_s = 10\n[http]")))
    assert storescu(small_study(tmp_path / "study", 1)) == 0
    assert wait_until(lambda: finished(service), 40), service.queue.latest()
    assert len(orthanc.results()) == 3
    lines = (Path("node") / "logs" / "audit.jsonl").read_text().splitlines()
    (said,) = [json.loads(line) for line in lines if '"committed"' in line]
    assert (said["peer"], said["objects"], said["asked"]) == ("ORTHANC", 3, True)


def test_without_a_promise_a_job_is_not_delivered(orthanc, serve, configure, tmp_path):
    """Orthanc's way back is shut: it stores, and cannot say so."""
    asked = 'aet = "ORTHANC"\ncommits = true\n'
    changes = (("[http]", "commit_s = 1\n[http]"), ("attempts = 6", "attempts = 2"))
    service = serve(configure(('aet = "ORTHANC"\n', asked), *changes))
    service.receiver._peers.pop("ORTHANC")
    assert storescu(small_study(tmp_path / "study", 1)) == 0
    assert wait_until(lambda: finished(service, state="failed"), 40), service.queue.latest()
    (job,) = service.queue.latest()
    assert job.code == "peer.not-committed"
    assert {name: len(v) for name, v in orthanc.results().items()} == {"SEG": 1, "SR": 1, "OT": 1}
