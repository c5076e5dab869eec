"""A bundle's network as an ONNX graph, written node by node: no tracing and no PyTorch.

The graph holds no weights: its initializers point into the bundle's weights file by offset, so that
a bundle has every weight once. Only the full-resolution output is computed; the heads of the
coarser levels serve training alone and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from mome_sdk.architecture import LEAKY_SLOPE, NORM_EPS, Architecture
from mome_sdk.bundle import tensor_places

OPSET = (
    17  # InstanceNormalization and GatherElements as all three CPU runtimes and TensorRT read them
)
IR_VERSION = 8


def write_graph(path: Path, architecture: Architecture, weights: Path) -> None:
    """Write the graph of a network beside its weights.

    Args:
        path: File to write, in the folder of `weights`.
        architecture: Sizes of the network.
        weights: Safetensors file with every tensor of `architecture.tensor_shapes()`, float32.

    Input `image` is (B, C, D, H, W); outputs are `logits` (B, N, D, H, W) and `shares`
    (B, E, D, H, W), both as in `mome_sdk.engines.Engine`. B, D, H and W are free; edges are
    multiples of `architecture.window_multiple`.
    """
    model = build_graph(architecture, tensor_places(weights), weights.name)
    onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)  # by path: it then also opens the weights


def build_graph(
    architecture: Architecture, places: Mapping[str, tuple[int, int]], location: str
) -> onnx.ModelProto:
    """The graph, given offset and length in bytes of each tensor in the file `location`."""
    graph = _Graph(architecture, places, location)
    experts: list[str] = []
    features = ["image"]
    for i in range(architecture.experts):
        logits, first_stage = graph.unet(f"experts.{i}", "image")
        experts.append(logits)
        features.append(first_stage)
    if architecture.gated:
        gates, _ = graph.unet("gate", graph.add("Concat", features, "gate.input", axis=1))
        products = graph.products(experts, gates)
        graph.add("Sum", products, "logits")
    else:
        products = experts
        graph.add("Identity", experts, "logits")
    graph.shares(products)
    return graph.model()


class _Graph:
    """Nodes and initializers so far; each method returns the name of what it computes."""

    def __init__(
        self, architecture: Architecture, places: Mapping[str, tuple[int, int]], location: str
    ) -> None:
        self.arch = architecture
        self.places = places
        self.shapes = architecture.tensor_shapes()
        self.location = location
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str) -> str:
        offset, length = self.places[name]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=self.shapes[name])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def weighted(self, op: str, x: str, name: str, **attributes: Any) -> str:
        """A node with the parameters `name.weight` and `name.bias`."""
        inputs = [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self.add(op, inputs, name, **attributes)

    def stack(self, name: str, x: str, count: int, stride: int = 1) -> str:
        """Convolution, norm, LeakyReLU, `count` times; the first convolution carries the stride."""
        for c in range(count):
            block = f"{name}.convs.{c}"
            strides = [stride if c == 0 else 1] * 3
            x = self.weighted("Conv", x, f"{block}.conv", pads=[1] * 6, strides=strides)
            x = self.weighted("InstanceNormalization", x, f"{block}.norm", epsilon=NORM_EPS)
            x = self.add("LeakyRelu", [x], block, alpha=LEAKY_SLOPE)
        return x

    def unet(self, name: str, x: str) -> tuple[str, str]:
        """Full-resolution head output, and the first encoder stage's output."""
        skips = []
        for s, count in enumerate(self.arch.encoder_convs):
            x = self.stack(f"{name}.encoder.stages.{s}.0", x, count, self.arch.strides[s])
            skips.append(x)
        for d, count in enumerate(self.arch.decoder_convs):
            up = f"{name}.decoder.transpconvs.{d}"
            edge = [self.arch.strides[-1 - d]] * 3
            x = self.weighted("ConvTranspose", x, up, kernel_shape=edge, strides=edge)
            x = self.add("Concat", [x, skips[-2 - d]], f"{up}.skip", axis=1)
            x = self.stack(f"{name}.decoder.stages.{d}", x, count)
        head = f"{name}.decoder.seg_layers.{self.arch.stages - 2}"
        return self.weighted("Conv", x, head), skips[0]

    def products(self, experts: Sequence[str], gates: str) -> list[str]:
        """Expert logits times their gate maps: E tensors (B, N, D, H, W)."""
        names = [f"gate.{i}" for i in range(self.arch.experts)]
        split = self.constant("gate.split", [self.arch.classes] * self.arch.experts)
        self.nodes.append(
            helper.make_node("Split", [gates, split], names, name="gate.maps", axis=1)
        )
        return [
            self.add("Mul", [expert, gate], f"product.{i}")
            for i, (expert, gate) in enumerate(zip(experts, names, strict=True))
        ]

    def shares(self, products: Sequence[str]) -> None:
        """abs(product) of the class with the larger fused logit, one channel per expert."""
        winner = self.add("ArgMax", ["logits"], "winner", axis=1, keepdims=1)
        picked = [
            self.add("GatherElements", [product, winner], f"picked.{i}", axis=1)
            for i, product in enumerate(products)
        ]
        self.add("Abs", [self.add("Concat", picked, "picked", axis=1)], "shares")

    def constant(self, name: str, values: Sequence[int]) -> str:
        self.initializers.append(
            helper.make_tensor(name, TensorProto.INT64, [len(values)], list(values))
        )
        return name

    def model(self) -> onnx.ModelProto:
        def tensor(name: str, channels: int) -> onnx.ValueInfoProto:
            shape: list[str | int | None] = ["batch", channels, "depth", "height", "width"]
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "MoME",
            [tensor("image", self.arch.in_channels)],
            [tensor("logits", self.arch.classes), tensor("shares", self.arch.experts)],
            initializer=self.initializers,
        )
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph, producer_name="mome_sdk", ir_version=IR_VERSION, opset_imports=opset
        )
