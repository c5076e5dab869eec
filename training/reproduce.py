"""`tables`: every system trained, evaluated and put into tables by one command that resumes.

What is finished is never done again: a network that is in the work folder, a case that stands in
results.csv, a system that stands in systems.csv. So the command can be stopped at any time, and
goes on where it was; of a work folder that is gone, the experts come back from the results.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from mome_sdk.architecture import Architecture
from mome_sdk.files import make_folders, write_file
from mome_sdk.network import MoME
from mome_sdk.settings import build, read_toml

from .assess import assess, write_features
from .benchmark import SETS, BenchmarkConfig, make_benchmark
from .comparators.hermes import Hermes, HermesConfig
from .comparators.modality_onehot import ModalityOneHot
from .comparators.multitalent import MultiTalent
from .comparators.nnunet import NnUNet
from .comparators.sam_med3d import SamConfig, SamMed3D
from .config import StageConfig, TrainConfig
from .dataset import Scan, build_cache, check_splits, tasks_of
from .mome import Mome
from .results import SystemRecord, append_row, read_rows, slug
from .sampling import SamplingOptions, scan_source
from .stages import VALIDATION, fit_joint, table_sources, train_expert, with_experts
from .system import System
from .tables import write_all
from .train import fit, load_weights, save_weights

TASK_STREAM, SINGLE_STREAM = 2000, 500
EXPERT = "expert"
EXPERTS_ALONE = "own expert alone"


@dataclass(frozen=True)
class TablesConfig:
    """All systems of the tables.

    Attributes:
        name: Of the tables.
        seeds: Of weights and patches; the first for every system.
        repeated: Names of the systems that have the other seeds, too.
        benchmark: The data.
        mome: Its stages.
        nnunet, task_specific, multitalent, hermes, sam_med3d: Stages of the others; nnunet's is
            that of the nnU-Net which is told the modality, too.
        hermes_network, sam_network: Sizes of what is no plain U-Net.
    """

    name: str
    seeds: tuple[int, ...]
    repeated: tuple[str, ...]
    benchmark: BenchmarkConfig
    mome: TrainConfig
    nnunet: StageConfig
    task_specific: StageConfig
    multitalent: StageConfig
    hermes: StageConfig
    hermes_network: HermesConfig
    sam_med3d: StageConfig
    sam_network: SamConfig


def load_tables_config(path: Path) -> TablesConfig:
    """Read a configuration of all systems.

    Raises:
        InputError: `argument.config`.
    """
    return build(TablesConfig, read_toml(path), str(path))


ABLATIONS: dict[str, dict[str, Any]] = {
    "MoME": {},
    "MoME without experts": {"experts": "random"},
    "MoME without hierarchical gating": {"gates": "finest"},
    "MoME without curriculum": {"curriculum": "none"},
}


class Cost(NamedTuple):
    """What training took: time that cores were busy, and the largest memory of a stage."""

    seconds: float
    peak_mb: float


class Trained(NamedTuple):
    """A system with its trained weights, and what that took.

    systems: One with the name "", or one for each task or modality; steps, cost: Of all its stages.
    """

    name: str
    seed: int
    systems: dict[str, System]
    steps: int
    cost: Cost


class Bench(NamedTuple):
    """What all systems share: configuration, cases with their cache, folder of the networks."""

    config: TablesConfig
    scans: tuple[Scan, ...]
    cache: Path
    work: Path


def open_bench(config: TablesConfig, labelmaps: Path, work: Path, *, processes: int = 1) -> Bench:
    """Make the benchmark and its cache, as far as they are not there."""
    scans = make_benchmark(config.benchmark, labelmaps, work / "data", processes=processes)
    check_splits(scans, config.mome.modalities, validation=True)
    build_cache(scans, work / "cache")
    return Bench(config, scans, work / "cache", work)


def waves(config: TablesConfig) -> Iterator[list[tuple[str, int]]]:
    """(system, seed) of all that is to be trained; those of a list can be trained side by side."""
    first, *others = config.seeds
    experts = [f"{EXPERT} {modality}" for modality in config.mome.modalities]
    yield [(name, first) for name in experts]
    names = sorted((*SINGLE, *ABLATIONS), key=lambda name: name not in ("nnU-Net", "MoME"))
    yield [(name, first) for name in names]
    for seed in others:
        names = [name for name in names if name in config.repeated]
        if any(name in ABLATIONS for name in names):
            yield [(name, seed) for name in experts]
        yield [(name, seed) for name in names]


def train_system(bench: Bench, name: str, seed: int) -> Trained | None:
    """Train what a wave names, or load it; an expert alone is no system."""
    if name.startswith(EXPERT):
        config = dataclasses.replace(bench.config.mome, seed=seed)
        sources = table_sources(config, bench.scans, bench.cache)
        train_expert(config, name.removeprefix(EXPERT).strip(), sources, _run(bench, seed))
        return None
    return SINGLE[name](bench, seed) if name in SINGLE else mome(bench, name, seed)


def mome(bench: Bench, name: str, seed: int) -> Trained:
    """MoME or an ablation of it; the experts of a seed are trained once for all of them."""
    config = dataclasses.replace(bench.config.mome, seed=seed)
    stage = dataclasses.replace(config.joint, **ABLATIONS[name])
    run = _run(bench, seed)
    sources = table_sources(config, bench.scans, bench.cache)
    where = _folder(bench, seed, slug(name)) / "network"
    model = with_experts(config, stage, run) if _is_missing(where) else MoME(config.architecture)
    if _is_missing(where):
        fit_joint(config, stage, model, sources, where)
        save_weights(model.state_dict(), where)
    model.load_state_dict(load_weights(where, name))
    steps, stages = stage.epochs * stage.iterations, [where]
    if stage.experts == "trained":
        steps += len(config.modalities) * config.experts.epochs * config.experts.iterations
        stages += [run / "experts" / modality for modality in config.modalities]
    system = Mome(model, config.modalities, config.loss, stage)
    return Trained(name, seed, {"": system}, steps, _cost_of(*stages))


def nnunet(bench: Bench, seed: int) -> Trained:
    """One nnU-Net on everything."""
    torch.manual_seed(seed)
    system = NnUNet(_single(bench.config.mome))
    return _train(bench, "nnU-Net", seed, system, bench.config.nnunet)


def multitalent(bench: Bench, seed: int) -> Trained:
    """A head for each task that is trained on."""
    torch.manual_seed(seed)
    tasks = list(tasks_of([scan for scan in bench.scans if scan.split == "train"]))
    system = MultiTalent(_single(bench.config.mome), tasks)
    return _train(bench, "Multi-Talent", seed, system, bench.config.multitalent)


def hermes(bench: Bench, seed: int) -> Trained:
    """A prior for each modality, one shared task."""
    torch.manual_seed(seed)
    system = Hermes(bench.config.hermes_network, bench.config.mome.modalities)
    return _train(bench, "Hermes", seed, system, bench.config.hermes)


def modality_onehot(bench: Bench, seed: int) -> Trained:
    """The nnU-Net, told the modality: what the knowledge alone is worth."""
    torch.manual_seed(seed)
    system = ModalityOneHot(_single(bench.config.mome), bench.config.mome.modalities)
    return _train(bench, "nnU-Net with modality", seed, system, bench.config.nnunet)


def sam_med3d(bench: Bench, seed: int) -> Trained:
    """Clicks, on whole heads."""
    torch.manual_seed(seed)
    system = SamMed3D(bench.config.sam_network)
    return _train(bench, "SAM-Med3D", seed, system, bench.config.sam_med3d)


def experts_alone(bench: Bench, seed: int) -> Trained:
    """The expert of the image's modality after stage 1: what gate and joint stage start from."""
    config, systems = bench.config.mome, {}
    stages = [_expert(bench, f"{EXPERT} {modality}", seed) for modality in config.modalities]
    for modality, where in zip(config.modalities, stages, strict=True):
        systems[modality] = NnUNet(_single(config))
        systems[modality].network.load_state_dict(load_weights(where, f"Expert {modality}"))
    steps = len(stages) * config.experts.epochs * config.experts.iterations
    return Trained(EXPERTS_ALONE, seed, {**systems}, steps, _cost_of(*stages))


def task_specific(bench: Bench, seed: int) -> Trained:
    """An nnU-Net for each task; for an unseen one, on its own cases: an upper bound.

    The unseen sets have test cases alone. Their models are trained on one half of the subjects and
    evaluated on the other, and the other way round.
    """
    name, stage = "task-specific nnU-Nets", bench.config.task_specific
    systems: dict[str, System] = {}
    stages = []
    for number, (key, scans) in enumerate(_task_cases(bench).items()):
        torch.manual_seed(1000 * seed + number)
        system = NnUNet(_single(bench.config.mome))
        where = _folder(bench, seed, slug(name)) / slug(key)
        _fit_once(bench, system, stage, scans, where, seed, TASK_STREAM + number)
        systems[key] = system
        stages.append(where)
    steps = len(stages) * stage.epochs * stage.iterations
    return Trained(name, seed, systems, steps, _cost_of(*stages))


SINGLE: dict[str, Callable[[Bench, int], Trained]] = {
    "nnU-Net": nnunet,
    EXPERTS_ALONE: experts_alone,
    "nnU-Net with modality": modality_onehot,
    "Multi-Talent": multitalent,
    "Hermes": hermes,
    "task-specific nnU-Nets": task_specific,
    "SAM-Med3D": sam_med3d,
}


def half_of(scan: Scan) -> int:
    """Which half of an unseen set a subject is in."""
    return int(scan.subject.rpartition("-")[2]) % 2


def _task_cases(bench: Bench) -> dict[str, list[Scan]]:
    """Cases of each model by its name: "<task>", or "<task> <half>" of an unseen set."""
    cases: dict[str, list[Scan]] = {}
    for task, scans in tasks_of(bench.scans).items():
        if SETS[scans[0].dataset].seen:
            cases[task] = [scan for scan in scans if scan.split != "test"]
        else:
            for half in (0, 1):  # the model of a half is trained on the other one
                train = [dataclasses.replace(s, split="train") for s in scans if half_of(s) != half]
                cases[f"{task} {half}"] = [*train, dataclasses.replace(train[0], split="val")]
    return cases


def assess_trained(trained: Trained, bench: Bench, folder: Path) -> None:
    """Every test case that the system can segment; its record; of some, what figures need."""
    tests = [scan for scan in bench.scans if scan.split == "test"]

    def choose(scan: Scan) -> str | None:
        if "" in trained.systems:
            needs = trained.systems[""].needs_at_test
            return None if "dataset" in needs and not _seen(scan) else ""
        if scan.modality in trained.systems:
            return scan.modality
        return scan.origin.task if _seen(scan) else f"{scan.origin.task} {half_of(scan)}"

    assess(
        trained.name,
        trained.seed,
        trained.systems,
        choose,
        tests,
        seen=_seen,
        patch=bench.config.mome.patch,
        folder=folder,
        scratch=bench.work / "bundles",
    )
    if trained.name in ("MoME", "nnU-Net") and trained.seed == bench.config.seeds[0]:
        network = trained.systems[""].network
        write_features(network, trained.name, trained.seed, tests, folder)
    if trained.seed == bench.config.seeds[0]:
        _keep_weights(trained, folder)
    _record(trained, folder)  # last: then it is done


def _seen(scan: Scan) -> bool:
    return SETS[scan.dataset].seen


def _record(trained: Trained, folder: Path) -> None:
    path = folder / "systems.csv"
    rows = read_rows(path, SystemRecord)
    if any((row.system, row.seed) == (trained.name, trained.seed) for row in rows):
        return
    networks = [system.network for system in trained.systems.values()]
    needs = {need for system in trained.systems.values() for need in system.needs_at_test}
    if "" not in trained.systems:  # to choose the model
        needs |= {"modality"} if trained.name == EXPERTS_ALONE else {"dataset", "modality"}
    append_row(
        path,
        SystemRecord(
            trained.name,
            trained.seed,
            "+".join(sorted(needs)),
            sum(p.numel() for network in networks for p in network.parameters()),
            len(networks),
            trained.steps,
            *trained.cost,
        ),
    )


def _keep_weights(trained: Trained, folder: Path) -> None:
    """weights/: of the first seed, in half precision; the results are those of float32."""
    if trained.name == EXPERTS_ALONE:  # they are there
        return
    for key, system in trained.systems.items():
        name = slug(f"{trained.name} {key}".strip()) + f"-{trained.seed}.safetensors"
        state = system.network.state_dict()
        half = {k: v.half().contiguous() for k, v in state.items()}
        make_folders(folder / "weights")
        write_file(folder / "weights" / name, save(half))


def reproduce(
    config: TablesConfig, labelmaps: Path, work: Path, folder: Path, *, processes: int = 1
) -> None:
    """Train, evaluate and tabulate everything that is not there yet.

    Each system has a process of its own, with one thread, so that its memory and time are its own.

    Args:
        config: Of all systems.
        labelmaps: Folder of the label maps.
        work: Folder of the benchmark, its cache and the networks.
        folder: Of the results: results.csv, systems.csv, tables/, figures/, logs/, weights/ (of
            the first seed; the other seeds' can be trained again).
        processes: That train side by side; nothing but the times depends on them.
    """
    make_folders(folder)
    bench = open_bench(config, labelmaps, work, processes=processes)
    _restore_experts(bench, folder)
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        for wave in waves(config):
            jobs = [
                pool.submit(_train_and_assess, bench, name, seed, folder)
                for name, seed in wave
                if not _is_done(bench, name, seed, folder)
            ]
            for job in as_completed(jobs):
                if job.exception():  # said now, not when all the others have ended
                    pool.shutdown(wait=False, cancel_futures=True)
                job.result()
                _keep_logs(bench, folder)
                write_all(folder)


def _is_done(bench: Bench, name: str, seed: int, folder: Path) -> bool:
    """Whether a system is evaluated, or an expert trained or needed no more."""
    rows = read_rows(folder / "systems.csv", SystemRecord)
    evaluated = {row.system for row in rows if row.seed == seed}
    if not name.startswith(EXPERT):
        return name in evaluated
    planned = {system for wave in waves(bench.config) for system, of in wave if of == seed}
    made_of_experts = planned & {*ABLATIONS, EXPERTS_ALONE}
    return made_of_experts <= evaluated or not _is_missing(_expert(bench, name, seed))


def _train_and_assess(bench: Bench, name: str, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    trained = train_system(bench, name, seed)
    if trained is not None:
        assess_trained(trained, bench, folder)
    elif seed == bench.config.seeds[0]:
        make_folders(folder / "weights")
        file = _expert(bench, name, seed).with_suffix(".safetensors")
        write_file(folder / "weights" / f"{slug(name)}-{seed}.safetensors", file.read_bytes())


def _expert(bench: Bench, name: str, seed: int) -> Path:
    return _run(bench, seed) / "experts" / name.removeprefix(EXPERT).strip()


def _restore_experts(bench: Bench, folder: Path) -> None:
    """Weights and logs of experts that are in the results and no more in the work folder."""
    for seed in bench.config.seeds:
        for modality in bench.config.mome.modalities:
            where = _expert(bench, f"{EXPERT} {modality}", seed)
            kept = folder / "weights" / f"{slug(f'{EXPERT} {modality}')}-{seed}.safetensors"
            log = folder / "logs" / f"seed-{seed}-experts-{modality}.csv"
            if _is_missing(where) and kept.exists() and log.exists():
                write_file(where.with_suffix(".csv"), log.read_bytes())
                write_file(where.with_suffix(".safetensors"), kept.read_bytes())


def _keep_logs(bench: Bench, folder: Path) -> None:
    for log in sorted(bench.work.glob("seed-*/**/*.csv")):
        name = "-".join(log.relative_to(bench.work).parts)
        (folder / "logs").mkdir(exist_ok=True)
        write_file(folder / "logs" / name, log.read_bytes())


def _train(bench: Bench, name: str, seed: int, system: System, stage: StageConfig) -> Trained:
    where = _folder(bench, seed, slug(name)) / "network"
    _fit_once(bench, system, stage, bench.scans, where, seed, SINGLE_STREAM)
    steps = stage.epochs * stage.iterations
    return Trained(name, seed, {"": system}, steps, _cost_of(where))


def _fit_once(
    bench: Bench,
    system: System,
    stage: StageConfig,
    scans: Sequence[Scan],
    where: Path,
    seed: int,
    stream: int,
) -> None:
    if _is_missing(where):
        options = SamplingOptions(
            patch=stage.patch or bench.config.mome.patch,
            batch=stage.batch,
            seed=seed,
            stream=stream,
            weighting=stage.weighting,
            augment=stage.augment == "nnunet",
        )
        held = dataclasses.replace(
            options, stream=stream + VALIDATION, weighting="uniform", augment=False
        )
        training = scan_source(bench.cache, [s for s in scans if s.split == "train"], options)
        validation = scan_source(bench.cache, [s for s in scans if s.split == "val"], held)
        fit(system, stage, training, where, validation=validation if stage.validation else None)
        save_weights(system.network.state_dict(), where)
    system.network.load_state_dict(load_weights(where, where.parent.name))


def _single(config: TrainConfig) -> Architecture:
    return dataclasses.replace(config.architecture, experts=1)


def _run(bench: Bench, seed: int) -> Path:
    """Folder of a seed, with its experts."""
    return _folder(bench, seed, "experts").parent


def _folder(bench: Bench, seed: int, name: str) -> Path:
    folder = bench.work / f"seed-{seed}" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_missing(where: Path) -> bool:
    return not where.with_name(f"{where.name}.safetensors").exists()


def _cost_of(*stages: Path) -> Cost:
    """Of stages, from their logs; NaN where one was not measured."""
    cores, peaks = [], []
    for where in stages:
        with where.with_name(f"{where.name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                cores.append(float(row.get("core_seconds", "nan")))
                peaks.append(float(row.get("peak_mb", "nan")))
    return Cost(float(np.sum(cores)), float(np.max(peaks)))
