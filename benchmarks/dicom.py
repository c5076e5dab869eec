"""The node without the network's time: series received, chosen, segmented by nothing, sent back."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from mome_sdk.nifti import NOTICE
from mome_sdk.pacs.audit import Audit
from mome_sdk.pacs.jobs import JobQueue
from mome_sdk.pacs.receiver import Receiver
from mome_sdk.pacs.settings import NodeConfig, Peer, ServiceConfig
from mome_sdk.pacs.worker import Worker
from mome_sdk.segmentation import Segmentation
from mome_sdk.volume import Volume

from .measure import Parity, Row, Sample, Table, say
from .orthanc import DICOM_PORT, NODE_PORT, Orthanc, isolated, program

MR = "1.2.840.10008.5.1.4.1.1.4"
ROOT = "1.2.826.0.1.3680043.10.99999."
SLICES, EDGE = 192, 256
BRIGHT = 3000


class Bright:
    """Instead of a network: what is brighter than any tissue."""

    def predict(self, volume: Volume) -> Segmentation:
        """The mask on the volume's grid."""
        made = {"bundle": "none", "bundle_sha256": "0" * 64, "engine": "threshold"}
        made |= {"classes": ["background", "lesion"], "precision": "fp32", "space": "native"}  # type: ignore[dict-item]
        mask = (volume.array > BRIGHT).astype(np.uint8)
        return Segmentation(mask, volume.affine, provenance={"mome_sdk": "bench", **made})


def run(*, series: int, threads: int) -> Table:
    """Seconds of each of so many series, at Orthanc and here, one after the other.

    Each has 192 slices of 256 x 256, 25 MB, sent by DCMTK's storescu over loopback to Orthanc, and
    to the node, which reads it, chooses it, and sends SEG, SR and preview to Orthanc. The time
    that a node waits for more images is left out, and that of the network: a threshold stands for
    it. The parity figure is that of the SEG's voxels, read back from Orthanc, with the mask.

    Raises:
        EngineError: `engine.missing`, a program is not installed, or this is not run by root.
    """
    storescu = program("storescu", "dcmtk")
    table = Table("dicom", {"series": series, "slices": SLICES, "rows": EDGE, "threads": threads})
    with isolated(), tempfile.TemporaryDirectory(prefix="mome-bench-") as name:
        folder = Path(name)
        (folder / "orthanc").mkdir()
        orthanc = Orthanc(folder / "orthanc")
        orthanc.start()
        try:
            with _node(folder) as node:
                _measure(table, _Bench(folder, storescu, orthanc, *node), series)
        finally:
            orthanc.stop()
    return table


class _Bench:
    """What a measurement needs."""

    def __init__(
        self, folder: Path, storescu: Path, orthanc: Orthanc, queue: JobQueue, worker: Worker
    ) -> None:
        self.folder, self.storescu, self.orthanc = folder, storescu, orthanc
        self.queue, self.worker = queue, worker
        self.template = _template()

    def send(self, number: int, to: str) -> float:
        """Seconds until all images of a series were acknowledged."""
        port = {"ORTHANC": DICOM_PORT, "MOME": NODE_PORT}[to]
        files = _write(self.template, self.folder / f"{to}-{number}", f"{number}{len(to)}")
        command = [str(self.storescu), "-aet", "SCANNER", "-aec", to, "127.0.0.1", str(port)]
        started = time.perf_counter()
        subprocess.run(
            [*command, *map(str, files)], check=True, env={**os.environ, "TCP_NODELAY": "1"}
        )
        seconds = time.perf_counter() - started
        for path in files:
            path.unlink()
        return seconds

    def work(self) -> tuple[float, float, Parity]:
        """Seconds for the results of the newest study, and to send them."""
        ((study, _, images, _, _),) = self.queue.pending()
        number = self.queue.complete(study, images)
        job = self.queue.lease()
        assert job is not None
        assert job.id == number
        started = time.perf_counter()
        self.worker.work(job)
        whole = time.perf_counter() - started
        done = self.queue.get(job.id)
        assert done is not None
        assert done.state == "delivered", done.message
        made_s = float(done.said["seconds"])
        return made_s, whole - made_s, self._parity()

    def _parity(self) -> Parity:
        (instance,) = self.orthanc.results()["SEG"]
        seg = dcmread(io.BytesIO(self.orthanc.file(instance)))
        expected = int((_voxels() > BRIGHT).sum())
        wrong = abs(int(seg.pixel_array.sum()) - expected)
        share = wrong / expected
        return Parity(
            share,
            share,
            wrong,
            expected,
            "the number of voxels over the threshold, in the SEG that Orthanc has",
        )

    def forget(self) -> None:
        """Remove everything: the disk need not hold all series."""
        for study in self.orthanc.get("/studies"):
            self.orthanc.ask(f"/studies/{study}", "DELETE")
        self.queue.sweep(0.0)


def _measure(table: Table, bench: _Bench, series: int) -> None:
    theirs: list[Sample] = []
    ours: list[Sample] = []
    worst = Parity(0.0, 0.0, 0, 0, "")
    missing = 0
    for number in range(series):
        theirs.append({"receive": bench.send(number, "ORTHANC")})
        missing += SLICES - int(bench.orthanc.get("/statistics")["CountInstances"])
        bench.forget()
        received = bench.send(number, "MOME")
        made, sent, parity = bench.work()
        ours.append({"receive": received, "read, choose, write": made, "send back": sent})
        worst = max(worst, parity, key=lambda each: (each.flips, each.voxels))
        bench.forget()
        say(f"series {number + 1} of {series}: {theirs[-1]} {ours[-1]}")
    total = SLICES * series
    stored = Parity(missing / total, missing / total, missing, total, "the images that were sent")
    name = "C-STORE to Orthanc"
    share = sum(s["receive"] for s in theirs) / sum(s["receive"] for s in ours)
    details = {"share_of_orthancs_rate": round(share, 3)}
    table.add(Row(name, "fp32", theirs, stored), limit=0.0)
    receive = [{"receive": sample["receive"]} for sample in ours]
    table.add(
        Row("C-STORE to the node", "fp32", receive, stored, baseline=name, details=details),
        limit=0.0,
    )
    table.add(Row("the node, all of it", "fp32", ours, worst), limit=0.0)


@contextmanager
def _node(folder: Path) -> Iterator[tuple[JobQueue, Worker]]:
    """The node's receiver, queue and worker; nothing runs but the receiver."""
    peers = (
        Peer("SCANNER", "127.0.0.1", 104, sends=True),
        Peer("ORTHANC", "127.0.0.1", DICOM_PORT, receives=True),
    )
    config = ServiceConfig(data=str(folder), peers=peers, free_mb=64)
    queue, audit = JobQueue(folder / "node", free_mb=64), Audit(folder / "node" / "logs")
    receiver = Receiver(NodeConfig(), peers, queue, audit)
    stand_in: Any = Bright()
    worker = Worker(config, queue, audit, segmenter=stand_in)
    receiver.start()
    try:
        yield queue, worker
    finally:
        receiver.stop()
        queue.close()


def _voxels() -> NDArray[np.uint16]:
    """A noisy head with one bright lesion, (slices, rows, columns)."""
    z, y, x = np.ogrid[-1 : 1 : SLICES * 1j, -1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
    head = (z / 0.9) ** 2 + (y / 0.85) ** 2 + (x / 0.65) ** 2 <= 1
    noise = np.random.default_rng(0).normal(800, 60, head.shape)
    lesion = (z - 0.1) ** 2 + (y - 0.2) ** 2 + (x - 0.25) ** 2 <= 0.006
    return np.where(lesion, 4000, np.where(head, noise, 20)).astype(np.uint16)


def _template() -> list[bytes]:
    """A FLAIR series as files, with a mark where the number of the study goes."""
    voxels, files = _voxels(), []
    for k in range(SLICES):
        image = _image(voxels[k], k)
        data = io.BytesIO()
        dcmwrite(data, image, enforce_file_format=True)
        files.append(data.getvalue())
    return files


def _image(pixels: NDArray[np.uint16], k: int) -> Dataset:
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = MR, f"{ROOT}7777777.3.{k}"
    image.StudyInstanceUID, image.SeriesInstanceUID = f"{ROOT}7777777.1", f"{ROOT}7777777.2"
    image.FrameOfReferenceUID = f"{ROOT}7777777.4"
    image.PatientName, image.PatientID = "Bench^Mark", "BENCH"
    image.PatientBirthDate = image.PatientSex = image.StudyID = image.AccessionNumber = ""
    image.ReferringPhysicianName = image.PositionReferenceIndicator = ""
    image.StudyDate = image.SeriesDate = "20260102"
    image.StudyTime = image.SeriesTime = "101500"
    image.Modality, image.Manufacturer, image.SeriesNumber = "MR", "NOBODY", 1
    image.ImageType, image.SeriesDescription = ["ORIGINAL", "PRIMARY", "M", "ND"], NOTICE[:64]
    image.ScanningSequence, image.SequenceVariant = ["SE", "IR"], "SK"
    image.EchoTime, image.RepetitionTime, image.InversionTime = 92, 9000, 2500
    image.InstanceNumber, image.PatientPosition = k + 1, "HFS"
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.ImagePositionPatient = [-128, -128, k - 96]
    image.PixelSpacing, image.SliceThickness = [1, 1], 1
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
    image.PixelData = pixels.tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return image


def _write(template: list[bytes], folder: Path, number: str) -> list[Path]:
    """The template as a study of its own: every UID has the number in place of the mark."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k:03d}" for k in range(len(template))]
    old, new = f"{ROOT}7777777.".encode(), f"{ROOT}1{number:0>6}.".encode()
    for path, data in zip(paths, template, strict=True):
        path.write_bytes(data.replace(old, new))
    return paths
