"""Many cases, in this process or in actors of Ray; what an earlier run did is not done again."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mome_sdk.cases import Case, draw_refusal
from mome_sdk.errors import EngineError, InputError, MomeError
from mome_sdk.exported import ExportedModel, load_model
from mome_sdk.files import make_folders, remove_file, write_file
from mome_sdk.model import Model
from mome_sdk.results import Results, Row, state_of
from mome_sdk.segmentation import Segmentation
from mome_sdk.segmenter import Segmenter

# Arguments of the Segmenter that change no voxel. Of the model its sha256 counts, not its place.
_NEUTRAL = ("model", "threads")
# What travels by Ray are paths and rows.
_OBJECT_STORE_BYTES = 100 * 2**20
_OF_PROVENANCE = ("windows", "engine", "device", "precision", "mirror", "bundle_sha256", "mome_sdk")


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: The case.
        row: Its row, as in the manifest and in results.csv.
        record: What `--json` prints of it (result.schema.json); None if an earlier run did it.
    """

    case: Case
    row: Row
    record: dict[str, Any] | None


def run(
    cases: Sequence[Case],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    force: bool = False,
    ray: int | None = None,
) -> Generator[Outcome, None, None]:
    """Segment cases into a folder; what an earlier run did there is not done again.

    Args:
        cases: What to read and write; see `collected_cases`.
        folder: Where all their files go, with `manifest.jsonl` and `results.csv` (see Results).
        settings: The arguments of the Segmenter, as JSON values.
        force: Go on where a check of the preparation says no; see `Segmenter.predict`.
        ray: None to work in this process; else the number of Ray actors, each with a Segmenter
            of its own, on the machines of RAY_ADDRESS or, without that, on this one.

    Yields:
        An Outcome for every case: those of earlier runs first, then the others as they end, their
        rows on the disk already. A run that is killed loses the cases in progress, nothing else.

    Raises:
        InputError: `argument.output`, as Results; `argument.ray`, the number of actors.
        BundleError, EngineError, InputError: as Segmenter. `engine.missing`: Ray is not installed.
    """
    if ray is not None and ray < 1:
        raise InputError(
            "argument.ray", f"The number of actors is {ray}.", hint="1 or more is expected."
        )
    call = inspect.signature(Segmenter).bind(**settings)
    call.apply_defaults()
    model = load_model(call.arguments["model"])
    wanted = {name: path is not None for name, path in cases[0].outputs.items()}
    options = {
        **{name: value for name, value in call.arguments.items() if name not in _NEUTRAL},
        **{name: wanted[name] for name in ("probability", "report")},
        "precision": call.arguments["precision"] or model.precision,
        "force": force,
        "bundle_sha256": model.sha256,
        "export_sha256": model.export_sha256 if isinstance(model, ExportedModel) else None,
        "mome_sdk": version("mome-sdk"),
    }
    with Results(folder, options) as results:
        images = {case: state_of(case.image) for case in cases}
        waiting = []
        for case, image in images.items():
            row = results.settled(case.mask, image)
            if row is None:
                waiting.append(case)
            else:
                yield Outcome(case, row, None)
        if any(case.bids for case in cases):
            _describe_dataset(folder)
        outcomes = (
            _in_actors(waiting, settings, ray, force=force)
            if ray
            else _in_this_process(waiting, {**settings, "model": model}, force=force)
        )
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                row = results.add(outcome.row, images[outcome.case])
                yield Outcome(outcome.case, row, outcome.record)


def segment(
    segmenter: Segmenter, cases: Sequence[Case], *, force: bool = False
) -> Generator[Outcome, None, None]:
    """Segment cases one after the other and write their files; an Outcome for each, in order.

    The next image is read and prepared while the network works on the present one. No file of a
    case with an error is left.
    """
    shares = any(case.report is not None for case in cases)
    results = segmenter.predict_batch((case.image for case in cases), shares=shares, force=force)
    with contextlib.closing(results):
        for case, result in zip(cases, results, strict=True):
            if result.segmentation is not None:
                yield _written(case, result.segmentation, segmenter.bundle)
            elif result.error is not None:
                draw_refusal(result.error, case.image, case.refused, segmenter.bundle)
                yield _failed(case, result.error)


def _written(case: Case, segmentation: Segmentation, bundle: Model) -> Outcome:
    try:
        make_folders(case.mask.parent)
        case.save(segmentation, bundle)
    except MomeError as error:
        for path in case.files:
            remove_file(path)
        return _failed(case, error)
    made = segmentation.provenance
    lesions = segmentation.lesions
    row = {
        **_start_of_row(case, "done"),
        "lesions": len(lesions),
        "volume_ml": segmentation.volume_ml,
        "largest_ml": lesions[0].volume_ml if lesions else 0.0,
        **{name: made[name] for name in _OF_PROVENANCE},
        "files": {str(path): path.stat().st_size for path in case.files},
        "seconds": {stage: round(s, 3) for stage, s in segmentation.timings.items()},
    }
    return Outcome(case, row, case.record(segmentation))


def _failed(case: Case, error: MomeError) -> Outcome:
    message = " ".join(f"{error.message} {error.hint}".split())
    row = {**_start_of_row(case, "failed"), "code": error.code, "message": message}
    return Outcome(case, row, case.refusal(error))


def _start_of_row(case: Case, status: str) -> Row:
    return {
        "input": case.name,
        "output": str(case.mask),
        "status": status,
        "files": {},
        "seconds": {},
    }


def _describe_dataset(folder: Path) -> None:
    """Make the results a BIDS derivative dataset (specification 1.9), unless they are one."""
    path = folder / "dataset_description.json"
    if path.exists():
        return
    description = {
        "Name": "Brain lesion masks",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "mome_sdk", "Version": version("mome-sdk")}],
    }
    write_file(path, json.dumps(description, indent=2).encode() + b"\n")


def _in_this_process(
    cases: Sequence[Case], settings: Mapping[str, Any], *, force: bool
) -> Generator[Outcome, None, None]:
    if cases:
        with Segmenter(**settings) as segmenter:
            yield from segment(segmenter, cases, force=force)


def _in_actors(
    cases: Sequence[Case], settings: Mapping[str, Any], actors: int, *, force: bool
) -> Generator[Outcome, None, None]:
    """The outcomes of cases that Ray Data spreads over actors, as they end.

    A case is tried three times at most where its actor is lost; then that is its error.
    """
    if not cases:
        return
    with _ray() as ray:
        cpus = _share_of("CPU", actors, ray.nodes())
        gpus = 0.0
        if str(settings.get("device", "cpu")).startswith("cuda"):
            gpus = min(1.0, _share_of("GPU", actors, ray.nodes()))
        threads = settings.get("threads") or max(1, int(cpus))
        items = [{"number": n, "case": pickle.dumps(case)} for n, case in enumerate(cases)]
        with warnings.catch_warnings():
            # Ray 2.60 has no other way yet to bound the retries; 2.64 takes this one away.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Actor,
                fn_constructor_args=({**settings, "threads": threads}, str(Path.cwd()), force),
                batch_size=1,
                # One case at a time: those that wait in an actor's queue would be lost with it.
                compute=ray.data.ActorPoolStrategy(
                    size=min(actors, len(cases)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=cpus,
                num_gpus=gpus,
                max_task_retries=2,
            )
        lost = dict(enumerate(cases))
        # Without prefetching: a row is to be on the disk when its case is done, not one later.
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            for number, said in zip(batch["number"], batch["said"], strict=True):
                yield _outcome_of(lost.pop(int(number)), json.loads(said))
    for case in lost.values():
        problem = EngineError(
            "engine.actor-lost",
            "The process that worked on this image ended three times.",
            hint="Often memory ran out: use fewer actors, or look at the logs of Ray.",
        )
        yield _failed(case, problem)


class _Actor:
    """A Segmenter in a process of Ray; does one case a call.

    Args:
        settings: The arguments of the Segmenter.
        folder: Where relative paths start.
        force: As of `run`.
    """

    def __init__(self, settings: Mapping[str, Any], folder: str, force: bool) -> None:
        os.chdir(folder)
        self._force = force
        self._settings = settings
        self._segmenter: Segmenter | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """One row in, one row out: `number` as it was, `said` for `_outcome_of`.

        Nothing is raised: Ray Data would leave the case out without a word.
        """
        said: dict[str, Any]
        try:
            if self._segmenter is None:
                self._segmenter = Segmenter(**self._settings)
            (outcome,) = segment(
                self._segmenter, [pickle.loads(batch["case"][0])], force=self._force
            )
            said = {"row": outcome.row, "record": outcome.record}
        except MomeError as error:
            said = {"refusal": (error.code, error.message, error.hint)}
        except Exception:
            said = {"defect": traceback.format_exc()}
        return {"number": batch["number"], "said": [json.dumps(said)]}


def _outcome_of(case: Case, said: dict[str, Any]) -> Outcome:
    """What an actor said of a case; what stops this process stops the whole run there too."""
    if "refusal" in said:
        code, message, hint = said["refusal"]
        raise MomeError(code, message, hint=hint)
    if "defect" in said:
        raise RuntimeError(f"An actor says: {said['defect']}")
    return Outcome(case, said["row"], said["record"])


@contextlib.contextmanager
def _ray() -> Iterator[Any]:
    """Ray as the caller has started it, or of RAY_ADDRESS, or on this machine alone; quiet."""
    address = os.environ.get("RAY_ADDRESS", "local")
    local = address == "local"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if local:  # loopback only, which Ray does by itself on the systems that the switch is named for
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(
            "engine.missing",
            f"Ray Data cannot be loaded: {error}.",
            hint='Add it: pip install "mome-sdk[ray]".',
        ) from error
    ours = not ray.is_initialized()
    if ours:
        try:
            _check_reachable(address)
            ray.init(
                address,
                include_dashboard=False if local else None,
                object_store_memory=_OBJECT_STORE_BYTES if local else None,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except OSError as error:
            raise EngineError(
                "engine.ray",
                f"There is no Ray at RAY_ADDRESS, {address!r}: {error}.",
                hint="Correct it, or unset it to work on this machine.",
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a case that kills its actor must not stop the rest
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Find out in seconds that nobody listens at host:port: Ray would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()


def _share_of(resource: str, actors: int, nodes: Sequence[Mapping[str, Any]]) -> float:
    """How much of a resource each actor can have, when they are spread evenly over the machines.

    Whole numbers over 1, as Ray asks for; a part of a core or of a GPU under it.
    """
    amounts = [node["Resources"].get(resource, 0.0) for node in nodes if node["Alive"]]
    amounts = [amount for amount in amounts if amount > 0]
    if not amounts:
        raise EngineError(
            "engine.device",
            f"No machine of Ray has a {resource}.",
            hint="Use another device, or start Ray where there is one.",
        )
    share = min(amounts) / math.ceil(actors / len(amounts))
    return float(int(share)) if share >= 1 else math.floor(share * 1000) / 1000
