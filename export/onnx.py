"""A network as an ONNX file of its own, for runtimes and for TensorRT: fp32 or fp16, any batch.

PyTorch's exporter writes it, from the fused network. (The graph inside a bundle is another file's
work, graph.py: float32, any size of window, its weights those of the bundle; it is written by `mome
import`, without this exporter.) Every tensor has its type in the graph, as TensorRT 11 asks for:
nothing is left to a runtime's choice.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from onnx.external_data_helper import set_external_data

from mome_sdk.errors import EngineError
from mome_sdk.exported import ARTEFACTS

from .job import Job

OPSET = 20  # what TensorRT 10.13 and 11 read; the first with these norms in half precision
OPERATORS = {
    *("Conv", "ConvTranspose", "InstanceNormalization", "LeakyRelu", "Cast", "Add", "Mul"),
    *("Split", "Concat", "Slice", "ReduceSum", "Greater", "Where", "Max", "Abs"),
}


def write_onnx(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.onnx and its weights, model.onnx.data.

    Input `image` is (B, C, D, H, W); outputs are `logits` (B, N, D, H, W) and `shares`
    (B, E, D, H, W), all float32. D, H, W are the bundle's patch; B is the job's batch, or free.

    Returns:
        The opset, and how often each operator is used.

    Raises:
        EngineError: `engine.failed`, an operator was written that is none of OPERATORS.
    """
    graph_file, data_file = ARTEFACTS["onnx"]
    model = _exported(job)
    _name_layers(model.graph)
    _describe(model, job)
    counts = _operators(model)
    for tensor in model.graph.initializer:
        if tensor.name.endswith((".weight", ".bias")):  # not what the checker reads: indices
            set_external_data(tensor, location=data_file)
    onnx.save_model(model, str(folder / graph_file))
    del model
    onnx.checker.check_model(str(folder / graph_file), full_check=True)  # by path: with its data
    return {"opset": OPSET, "operators": counts}


def _exported(job: Job) -> onnx.ModelProto:
    sizes = None if job.batch else {"image": {0: torch.export.Dim("batch")}}
    with _quiet():
        program = torch.onnx.export(
            job.network,
            (job.example(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits", "shares"],
            dynamic_shapes=sizes,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says about itself from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_layers(graph: onnx.GraphProto) -> None:
    """Call layers with weights as the network calls them, so that a report of an engine reads."""
    for node in graph.node:
        names = [name for name in node.input if name.endswith(".weight")]
        if names:
            node.name = names[0].removesuffix(".weight")


def _describe(model: onnx.ModelProto, job: Job) -> None:
    """What a program that has only this file must know."""
    bundle = job.bundle
    facts = {
        "bundle": bundle.name,
        "bundle_sha256": bundle.sha256,
        "licence": bundle.licence,
        "notice": bundle.notice,
        "precision": job.precision,
        "experts": job.experts,
        "fp32_tensors": json.dumps(job.fp32_tensors),
        "patch": json.dumps(bundle.patch),
        "axes": bundle.axes,
        "modalities": json.dumps(bundle.modalities),
        "classes": json.dumps(bundle.classes),
    }
    model.producer_name = "mome_sdk"
    helper.set_model_props(model, {f"mome.{name}": fact for name, fact in facts.items()})


def _operators(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        name = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
    if unknown := sorted(counts.keys() - OPERATORS):
        raise EngineError(
            "engine.failed",
            f"The exporter wrote operators that were not expected: {', '.join(unknown)}.",
            hint="Export with the torch and onnxscript versions that this package was tested with.",
        )
    return dict(sorted(counts.items()))
