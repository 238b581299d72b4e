"""Liveness on networks drawn at random, against the C emitter and against a simulation; sizes against torch hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qopt.emit.c import emit_c
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import module_to_onnx
from qopt.hardware.cost_model import Step, peak
from qopt.hardware.describe import NetworkDescription, describe
from qopt.plan import uniform
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

MakeGraph = Callable[..., Prepared]
SIDE = 6


def random_graph(make_graph: MakeGraph, seed: int, length: int = 7) -> Prepared:
    """Convolutions, sums, concatenations and pools over tensors that are still there, ending in a classifier."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str, str, dict[str, Any]]] = [("Conv", "x t0.w", "c0", {"pads": [1, 1, 1, 1]})]
    rows.append(("Relu", "c0", "t0", {}))
    constants: dict[str, Any] = {"t0.w": (int(rng.integers(1, 5)), 2, 3, 3)}
    known = {"t0": constants["t0.w"][0]}
    for i in range(1, length):
        name, source = f"t{i}", str(rng.choice(list(known)))
        kind = rng.choice(["conv", "add", "concat", "pool"])
        peers = [other for other, width in known.items() if width == known[source] and other != source]
        if kind == "add" and peers:
            rows += [("Add", f"{source} {rng.choice(peers)}", f"s{i}", {}), ("Relu", f"s{i}", name, {})]
            known[name] = known[source]
        elif kind == "concat" and len(known) > 1:
            other = str(rng.choice([one for one in known if one != source]))
            rows.append(("Concat", f"{source} {other}", name, {"axis": 1}))
            known[name] = known[source] + known[other]
        elif kind == "pool":
            pads = {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}
            rows.append(("MaxPool", source, name, pads))
            known[name] = known[source]
        else:
            width = int(rng.integers(1, 6))
            constants[f"{name}.w"] = (width, known[source], 3, 3)
            rows += [("Conv", f"{source} {name}.w", f"c{i}", {"pads": [1, 1, 1, 1]}), ("Relu", f"c{i}", name, {})]
            known[name] = width
    last = list(known)[-1]
    constants["f.w"] = (3, known[last] * SIDE * SIDE)
    rows += [("Flatten", last, "flat", {}), ("Gemm", "flat f.w", "f", {"transB": 1})]
    used = {word for _, words, _, _ in rows for word in words.split()}
    dead = [row for row in rows if row[2] not in used and row[2] != "f"]
    while dead:
        rows = [row for row in rows if row not in dead]
        used = {word for _, words, _, _ in rows for word in words.split()}
        dead = [row for row in rows if row[2] not in used and row[2] != "f"]
    return make_graph((2, SIDE, SIDE), rows, {name: size for name, size in constants.items() if name in used})


@pytest.mark.parametrize("seed", range(12))
def test_peak_memory_is_that_of_the_c_program(make_graph: MakeGraph, seed: int) -> None:
    prepared = random_graph(make_graph, seed)
    images = torch.rand(4, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    plan = uniform(WeightSpec.parse("int8"), ActivationSpec.parse("int8"))
    program = emit_c(prepared, Quantizer(prepared, images).apply(plan).quantized, name="net")
    tensors = [buffer for buffer in program.memory.buffers if not buffer.name.startswith("scratch")]
    steps = range(len(program.network.steps))
    expected = max((sum(b.bytes for b in tensors if b.first <= i <= b.last) for i in steps), default=0)
    ends = {prepared.input, prepared.output}
    network = describe(prepared, 8)
    assert max(sum(one.bytes for one in step.live if one.name not in ends) for step in network.steps) == expected


def lower_bound(prepared: Prepared, network: NetworkDescription) -> int:
    """Bytes that any execution needs: the largest tensor that a node reads."""
    sizes = {one.name: one.bytes for step in network.steps for one in step.live}
    return max(max(sizes.get(str(value.name), 0) for value in node.inputs if value) for node in prepared.model.graph)


@pytest.mark.parametrize("seed", range(12, 24))
def test_what_a_step_reads_and_writes_is_in_memory(make_graph: MakeGraph, seed: int) -> None:
    prepared = random_graph(make_graph, seed)
    network = describe(prepared, 8)
    for step in network.steps:
        assert len({one.name for one in step.live}) == len(step.live)
        assert step.bytes >= max(step.reads // (2 if step.op in ("Add", "Concat") else 1), step.writes)
    widest = peak(network.steps)
    assert widest is not None
    assert widest.bytes >= lower_bound(prepared, network)
    assert widest.bytes <= sum({one.name: one.bytes for step in network.steps for one in step.live}.values())
    assert prepared.input in {one.name for one in network.steps[0].live}
    assert prepared.output in {one.name for one in network.steps[-1].live}


@pytest.mark.parametrize("seed", range(24, 30))
def test_a_tensor_is_in_memory_without_a_gap(make_graph: MakeGraph, seed: int) -> None:
    network = describe(random_graph(make_graph, seed), 8)
    for name in {one.name for step in network.steps for one in step.live}:
        there = [i for i, step in enumerate(network.steps) if name in {one.name for one in step.live}]
        assert there == list(range(there[0], there[-1] + 1))


class Mixed(nn.Module):
    """Every kind of layer once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.down = nn.Conv2d(4, 6, (1, 3), stride=(2, 1))
        self.fc = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = torch.relu(self.down(torch.relu(self.up(x))))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_sizes_are_those_that_torch_sees() -> None:
    """The oracle are forward hooks on the module that the network was exported from."""
    module = Mixed().eval()
    network = describe(prepare(module_to_onnx(module, (3, 12, 12))), 32)
    seen: dict[str, tuple[int, int]] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs, output: seen.update({f"{name}.weight": (inputs[0].numel(), output.numel())})

    for name, part in module.named_children():
        part.register_forward_hook(watch(name))
    module(torch.zeros(1, 3, 12, 12))
    assert {layer.name: (layer.inputs, layer.outputs) for layer in network.layers} == seen
    strides = {layer.name: layer.stride for layer in network.layers}
    assert strides["stem.weight"] == strides["up.weight"] == (2, 2)
    assert strides["down.weight"] == (2, 1)
    assert strides["fc.weight"] == ()
    assert network.layer("depthwise.weight").groups == 8
    assert {layer.name: layer.macs for layer in network.layers} == {
        "stem.weight": 8 * 36 * 75, "depthwise.weight": 8 * 36 * 9, "up.weight": 36 * 8 * 4 * 4,
        "down.weight": 6 * 60 * 12, "fc.weight": 60,
    }  # fmt: skip


class Tokens(nn.Module):
    """A network that takes no images."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.inner = nn.Linear(16, 32)
        self.outer = nn.Linear(32, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(tokens)
        changed: torch.Tensor = self.outer(torch.relu(self.inner(x)))
        return x + changed


@pytest.mark.parametrize("observe", [True, False])
def test_a_network_of_tokens_has_a_description_too(observe: bool) -> None:
    prepared = prepare(module_to_onnx(Tokens().eval(), None, example=(torch.zeros(2, 7, dtype=torch.int64),)))
    network = describe(prepared, 32, observe=observe)
    products = {layer.name: layer for layer in network.layers if layer.op in ("Gemm", "MatMul")}
    assert len(products) == 2
    tokens = {layer.macs // layer.weights for layer in products.values()}
    assert len(tokens) == 1
    assert all(isinstance(step, Step) for step in network.steps)
