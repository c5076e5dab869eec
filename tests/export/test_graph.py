"""The ONNX graph: what it holds, and that it is the network."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from conftest import TINY, random_tensors
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import create_bundle
from mome_sdk.export.graph import write_graph
from mome_sdk.network import MoME

SMALL = Architecture((3, 5, 7), (1, 2, 2), (1, 2, 1), (2, 1), in_channels=1, classes=3, experts=2)


@pytest.fixture(scope="module")
def graph(tiny_bundle) -> onnx.GraphProto:
    return onnx.load(str(tiny_bundle.path / "model.onnx"), load_external_data=False).graph


def test_every_weight_of_the_finest_level_is_in_the_graph_once(graph):
    names = [tensor.name for tensor in graph.initializer if tensor.name != "gate.split"]
    coarse = {name for name in TINY.tensor_shapes() if ".seg_layers.0." in name}
    assert sorted(names) == sorted(TINY.tensor_shapes().keys() - coarse)


def test_weights_lie_in_the_bundles_file(graph, tiny_bundle):
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == "weights.safetensors"
            data = (tiny_bundle.path / where["location"]).read_bytes()
            part = data[int(where["offset"]) :][: int(where["length"])]
            assert part == tiny_bundle.tensors[tensor.name].tobytes()


def test_inputs_and_outputs_have_the_documented_names_and_shapes(graph):
    def shape(value: onnx.ValueInfoProto) -> list[int | str]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    space = ["depth", "height", "width"]
    assert {v.name: shape(v) for v in graph.input} == {"image": ["batch", 1, *space]}
    assert {v.name: shape(v) for v in graph.output} == {
        "logits": ["batch", 2, *space],
        "shares": ["batch", 5, *space],
    }


def test_graph_is_the_network_for_uneven_sizes(tmp_path):
    tensors = random_tensors(SMALL, seed=3)
    bundle = create_bundle(
        tmp_path / "b",
        SMALL,
        tensors,
        name="uneven",
        patch=(8, 8, 8),
        blend="exact",
        training={},
        modalities=("T1", "T2"),
        classes=("background", "oedema", "core"),
        graph=write_graph,
    )
    network = MoME(SMALL).eval()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    image = np.random.default_rng(0).normal(size=(2, 1, 8, 12, 4)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)).fused[0].numpy()
    (logits,) = ort.InferenceSession(bundle.path / "model.onnx").run(["logits"], {"image": image})
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.ptp(expected))
