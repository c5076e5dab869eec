"""The synthetic benchmark: nine data sets with the structure of the paper's, painted into anatomy.

Names begin with "syn": nothing here is clinical data, and nothing that is learnt here carries over
to patients. The counts are those of the paper's split (datasplit.json of the MoME repository) and
of its three in-house sets, divided by `scale`. Subjects, not images, are split. Every image of a
subject shows the same head and the same lesions; a subject is a function of seed, data set and
number alone. Test subjects have anatomies that no training subject has.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mome_sdk.errors import InputError
from mome_sdk.files import make_folders, write_file
from mome_sdk.nifti import write_nifti
from mome_sdk.volume import Volume

from .anatomy import Anatomy, Byte, Float, deform, load_anatomy
from .dataset import Scan, write_table
from .lesions import LESIONS
from .scanner import Profile, label_of, render

LEAST = {"train": 3, "val": 1, "test": 4}  # subjects of a seen set
LEAST_UNSEEN = 8


@dataclass(frozen=True)
class DataSet:
    """One data set of the benchmark.

    Attributes:
        lesion: A key of LESIONS.
        modalities: Of every subject.
        subjects: Of the paper's set, (train, val, test); an unseen set has test subjects only.
        profile: Of its scanners.
    """

    lesion: str
    modalities: tuple[str, ...]
    subjects: tuple[int, int, int]
    profile: Profile

    @property
    def seen(self) -> bool:
        """Whether it has training subjects."""
        return self.subjects[0] > 0


WMH = "white matter hyperintensities"
SETS: dict[str, DataSet] = {
    "synBraTS": DataSet(
        "glioma",
        ("T1", "T1ce", "T2", "FLAIR"),
        (834, 208, 209),
        Profile(noise=(0.01, 0.03), bias=0.08, blur_mm=(0.4, 0.8), sites=6),
    ),
    "synATLAS": DataSet(
        "chronic stroke",
        ("T1",),
        (436, 109, 110),
        Profile(noise=(0.015, 0.04), bias=0.12, blur_mm=(0.4, 0.8), sites=6),
    ),
    "synOASIS": DataSet(
        WMH,
        ("T1", "FLAIR"),
        (80, 20, 50),
        Profile(noise=(0.02, 0.04), bias=0.1, blur_mm=(0.5, 0.9), slices_mm={"FLAIR": 3}, sites=2),
    ),
    "synISLES": DataSet(
        "acute stroke",
        ("DWI",),
        (120, 30, 100),
        Profile(noise=(0.02, 0.06), bias=0.15, blur_mm=(0.8, 1.2), slices_mm={"DWI": 4}, sites=3),
    ),
    "synWMH": DataSet(
        WMH,
        ("T1", "FLAIR"),
        (24, 6, 30),
        Profile(
            noise=(0.015, 0.035),
            bias=0.15,
            blur_mm=(0.4, 0.8),
            slices_mm={"FLAIR": 3},
            shift={"FLAIR": 0.05},
            sites=3,
        ),
    ),
    "synMSSEG": DataSet(
        "multiple sclerosis",
        ("T1", "T1ce", "T2", "FLAIR"),
        (8, 1, 6),
        Profile(noise=(0.01, 0.03), bias=0.08, blur_mm=(0.4, 0.7), sites=3),
    ),
    "synMETS": DataSet(
        "metastases",
        ("T1ce",),
        (0, 0, 69),
        Profile(noise=(0.02, 0.05), bias=0.18, blur_mm=(0.4, 0.9), shift={"T1ce": 0.04}, sites=4),
    ),
    "synHEM": DataSet(
        "haemorrhage",
        ("T2",),
        (0, 0, 67),
        Profile(noise=(0.03, 0.06), bias=0.2, blur_mm=(0.6, 1.0), slices_mm={"T2": 5}, sites=4),
    ),
    "synABSC": DataSet(
        "abscess",
        ("FLAIR",),
        (0, 0, 60),
        Profile(
            noise=(0.02, 0.06), bias=0.2, blur_mm=(0.6, 1.0), slices_mm={"FLAIR": 5}, strength=0.9
        ),
    ),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """The benchmark's size.

    Attributes:
        seed: Of every subject.
        spacing_mm: 1 (160x196x160 voxels) or 2 (80x98x80).
        scale: What the paper's numbers of subjects are divided by.
        train, test: Label maps (file stems) of training and validation subjects, and of test ones.
    """

    seed: int
    spacing_mm: int
    scale: float
    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.spacing_mm not in (1, 2) or self.scale <= 0 or not (self.train and self.test):
            raise InputError(
                "argument.config",
                f"The benchmark has {self.spacing_mm} mm, scale {self.scale}, "
                f"{len(self.train)} and {len(self.test)} anatomies.",
                hint="Expected: 1 or 2 mm, a positive scale, anatomies for both.",
            )
        if both := sorted({*self.train} & {*self.test}):
            raise InputError("argument.config", f"{both[0]} is an anatomy of both train and test.")


@dataclass(frozen=True)
class Subject:
    """One subject: all that its images are made from."""

    dataset: str
    number: int
    split: str

    @property
    def name(self) -> str:
        """ "sub-003", counted within the data set."""
        return f"sub-{self.number:03d}"


def plan(config: BenchmarkConfig) -> tuple[Subject, ...]:
    """Every subject, by data set and split."""
    subjects: list[Subject] = []
    for dataset, options in SETS.items():
        number = 0
        for split, count in zip(LEAST, options.subjects, strict=True):
            least = LEAST[split] if options.seen else LEAST_UNSEEN
            for _ in range(max(round(count / config.scale), least) if count else 0):
                subjects.append(Subject(dataset, number, split))
                number += 1
    return tuple(subjects)


def paint(
    config: BenchmarkConfig, subject: Subject, anatomies: Mapping[str, Anatomy]
) -> tuple[dict[str, Float], Byte]:
    """The images of a subject by modality, (D, H, W), and their common mask."""
    options = SETS[subject.dataset]
    index = list(SETS).index(subject.dataset)
    rng = np.random.default_rng([config.seed, index, subject.number])
    stems = config.test if subject.split == "test" else config.train
    anatomy = anatomies[stems[int(rng.integers(len(stems)))]]
    z, y, x = anatomy.tissue.shape
    head = deform(anatomy, (0, 0, 0), (z, y, x), rng)
    lesion = LESIONS[options.lesion](head, rng)
    site = 100 * index + int(rng.integers(options.profile.sites))
    images = {}
    for number, modality in enumerate(options.modalities, start=1):
        own = np.random.default_rng([config.seed, index, subject.number, number])
        images[modality] = render(
            head, lesion, modality, options.profile, site, own, factor=config.spacing_mm
        )
    return images, label_of(lesion, options.lesion, config.spacing_mm)


def scans_of(subject: Subject, folder: Path) -> dict[str, Scan]:
    """The rows of a subject's images, by modality."""
    options = SETS[subject.dataset]
    home = folder / subject.dataset
    return {
        modality: Scan(
            image=home / f"{subject.name}_{modality}.nii.gz",
            label=home / f"{subject.name}_lesion.nii.gz",
            dataset=subject.dataset,
            modality=modality,
            lesion_type=options.lesion,
            subject=subject.name,
            split=subject.split,
        )
        for modality in options.modalities
    }


def write_subject(
    config: BenchmarkConfig, subject: Subject, anatomies: Mapping[str, Anatomy], folder: Path
) -> None:
    """Write a subject's images and mask, axes R, A, S; the mask last: then all is there."""
    scans = scans_of(subject, folder)
    label = next(iter(scans.values())).label
    if label.exists():
        return
    images, mask = paint(config, subject, anatomies)
    affine = _affine(next(iter(anatomies.values())), config.spacing_mm)
    for modality, scan in scans.items():
        scaled = images[modality] * (1000 / max(float(images[modality].max()), 1e-6))
        write_nifti(Volume(np.rint(scaled).astype(np.int16), affine).reorient("RAS"), scan.image)
    write_nifti(Volume(mask, affine).reorient("RAS"), label)


def _affine(anatomy: Anatomy, factor: int) -> NDArray[np.float64]:
    """Of cubes of `factor` voxels: their centres lie between those of the voxels."""
    affine = anatomy.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.full(3, (factor - 1) / 2)
    affine[:3, :3] *= factor
    return affine


def make_benchmark(
    config: BenchmarkConfig, labelmaps: Path, folder: Path, *, processes: int = 1
) -> tuple[Scan, ...]:
    """Write the whole benchmark and its case table `cases.csv`; subjects that are there are kept.

    Args:
        config: Its size.
        labelmaps: Folder of the label maps that the configuration names.
        folder: Of the benchmark, made if need be.
        processes: That paint subjects side by side; the result does not depend on them.

    Raises:
        InputError: `argument.config`, the folder holds a benchmark of another configuration.
    """
    subjects = plan(config)
    make_folders(folder)
    for dataset in SETS:
        make_folders(folder / dataset)
    _check_same(config, folder)
    jobs = [(config, subject, labelmaps, folder) for subject in subjects]
    with ProcessPoolExecutor(processes) as pool:
        done = pool.map(_paint_one, jobs, chunksize=4)
        for _ in tqdm(done, total=len(jobs), desc="painting", unit="subject", disable=None):
            pass
    scans = tuple(scan for s in subjects for scan in scans_of(s, folder).values())
    write_table(scans, folder / "cases.csv")
    return scans


_anatomies: dict[Path, Anatomy] = {}  # of this process


def _paint_one(job: tuple[BenchmarkConfig, Subject, Path, Path]) -> None:
    config, subject, labelmaps, folder = job
    for stem in (*config.train, *config.test):
        path = labelmaps / f"{stem}.nii.gz"
        if path not in _anatomies:
            _anatomies[path] = load_anatomy(path)
    anatomies = {
        stem: _anatomies[labelmaps / f"{stem}.nii.gz"] for stem in (*config.train, *config.test)
    }
    write_subject(config, subject, anatomies, folder)


def _check_same(config: BenchmarkConfig, folder: Path) -> None:
    record = (json.dumps(asdict(config), indent=1) + "\n").encode()
    path = folder / "benchmark.json"
    if path.exists() and path.read_bytes() != record:
        raise InputError(
            "argument.config",
            f"{folder} holds a benchmark of another configuration.",
            hint="Name another folder, or remove this one.",
        )
    write_file(path, record)


def counts(scans: Sequence[Scan]) -> Iterator[str]:
    """Lines of a Markdown table: images of every task by split."""
    yield "| data set | lesion | modality | train | val | test |"
    yield "|---|---|---|---|---|---|"
    tasks = Counter((s.dataset, s.lesion_type, s.modality, s.split) for s in scans)
    for row in dict.fromkeys((s.dataset, s.lesion_type, s.modality) for s in scans):
        numbers = " | ".join(str(tasks[(*row, split)]) for split in LEAST)
        yield f"| {' | '.join(row)} | {numbers} |"
