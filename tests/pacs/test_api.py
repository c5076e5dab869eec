"""HTTP: uploads, jobs, health, metrics, the page; a token where it is asked for."""

from __future__ import annotations

import gzip
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dicom_files import PATIENT_ID
from mome_sdk.nifti import write_nifti
from pacs.conftest import OWN_HTTP, ask, small_study, wait_until
from phantom import grid, phantom

pytestmark = pytest.mark.slow


def wait_for(number: int) -> dict[str, Any]:
    end = time.monotonic() + 40
    while time.monotonic() < end:
        job = json.loads(ask(f"/v1/jobs/{number}")[1])
        if job["state"] in ("delivered", "failed"):
            return dict(job)
        time.sleep(0.1)
    raise AssertionError(job)


def zipped(folder: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return data.getvalue()


def test_a_zip_and_a_scan_are_segmented(serve, configure, tmp_path):
    service = serve(configure())
    assert wait_until(lambda: ask("/readyz")[0] == 200, 20)
    assert ask("/healthz")[0] == 200
    status, said = ask("/v1/predict", zipped(small_study(tmp_path / "study", 1)))
    assert status == 202
    job = wait_for(json.loads(said)["job"])
    assert job["state"] == "delivered", job
    assert job["found"]["modality"] == "FLAIR"
    assert {url.rpartition("/")[2] for url in job["results"]} == {
        *("seg", "sr", "sc"),
        "nifti",
    }
    assert ask(f"/v1/jobs/{job['job']}/results/seg")[1][128:132] == b"DICM"
    assert PATIENT_ID not in json.dumps(job)
    seen = gzip.decompress(ask(f"/v1/jobs/{job['job']}/scan")[1])
    assert seen[344:347] == b"n+1"
    assert PATIENT_ID.encode() not in seen

    volume = phantom(where=grid(10.0))
    write_nifti(volume, tmp_path / "scan.nii.gz")
    scan = (tmp_path / "scan.nii.gz").read_bytes()
    status, said = ask("/v1/predict", scan)
    number = json.loads(said)["job"]
    job = wait_for(number)
    (url,) = job["results"]
    (tmp_path / "mask.nii.gz").write_bytes(ask(url)[1])
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-4)
    assert int(np.asarray(mask.dataobj).sum()) == int((volume.array > 250).sum())
    assert json.loads(ask("/v1/predict", scan)[1])["job"] == number  # the same file, the same job
    page = ask(f"/jobs/{number}")[1].decode()
    assert "Research use only" in page
    assert f"<a href='/jobs/{number}'>" in ask("/")[1].decode()
    metrics = ask("/metrics")[1].decode()
    assert 'mome_jobs{state="delivered"} 2.0' in metrics
    assert service.queue.counts()["delivered"] == 2


def test_what_is_no_scan_is_refused(serve, configure):
    serve(configure(("[http]", "[http]\nbody_mb = 1")))
    assert ask("/v1/predict", b"hello")[0] == 415
    assert ask("/v1/predict", b"PK\x03\x04" + bytes(2**20))[0] == 413
    assert ask("/v1/jobs/7")[0] == 404
    status, said = ask("/v1/predict", b"PK\x03\x04 no zip")
    job = wait_for(json.loads(said)["job"])
    assert job["state"] == "failed"
    assert job["code"].startswith("dicom.")
    number = job["job"]
    assert ask(f"/v1/jobs/{number}/restart", b"")[0] == 200
    assert wait_for(number)["state"] == "failed"
    assert status == 202


def test_a_token_is_asked_for(serve, configure, tmp_path):
    (tmp_path / "token").write_text("a-long-enough-secret\n")
    serve(configure(("[http]", '[http]\ntoken_file = "token"')))
    assert ask("/healthz")[0] == 200
    assert ask("/v1/jobs")[0] == 401
    assert ask("/v1/jobs", Authorization="Bearer wrong")[0] == 401
    assert ask("/v1/jobs", Authorization="Bearer a-long-enough-secret")[0] == 200


def test_pages_of_other_sites_cannot_ask(serve, configure):
    """Neither under a name of their own that leads here, nor by a form."""
    serve(configure())
    assert ask("/v1/jobs")[0] == 200
    assert ask("/v1/jobs", Host=f"localhost:{OWN_HTTP}")[0] == 200
    assert ask("/v1/jobs", Host="rebound.example")[0] == 421
    assert ask("/v1/predict", b"PK\x03\x04", Origin="http://evil.example")[0] == 403
    assert ask("/static/..%2Fapi.py")[0] == 404
    assert ask("/static/api.py")[0] == 404


def test_a_full_disk_is_said_before_the_upload(serve, configure, monkeypatch):
    service = serve(configure())
    assert ask("/readyz")[0] == 200
    monkeypatch.setattr(service.queue, "has_room", lambda: False)
    assert ask("/v1/predict", b"PK\x03\x04")[0] == 503
    assert ask("/readyz")[0] == 503
    assert list((service.queue._incoming).iterdir()) == []
