"""After bias correction the mean of every output channel of every quantized layer is the float network's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.fx import GraphModule, Node

from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.base import Pipeline
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.correct_biases import CorrectBiases
from qopt.passes.insert_activation_quantizers import InsertActivationQuantizers
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers
from qopt.passes.nodes import is_layer, op_of
from qopt.passes.unshare import Unshare
from qopt.plan import Plan, uniform
from qopt.quantize import Quantizer, whole_batches
from qopt.spec import ActivationSpec, WeightSpec

Network = Callable[..., Prepared]
Images = Callable[..., torch.Tensor]
Record = Callable[[GraphModule, torch.Tensor], dict[Node, Any]]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]
INT2 = WeightSpec.parse("int2")


def _means(
    twin: GraphModule, prepared: Prepared, sample: torch.Tensor, record: Record
) -> dict[tuple[str, int], NDArray[np.float64]]:
    """(layer, use) to the mean of each output channel, batch by batch, in numpy."""
    parts: dict[tuple[str, int], list[NDArray[np.float64]]] = {}
    for chunk in torch.split(sample, prepared.batch or len(sample)):
        for node, value in record(twin, chunk).items():
            if is_layer(node):
                channels = np.moveaxis(value.numpy().astype(np.float64), 1 if "Conv" in op_of(node) else -1, 0)
                parts.setdefault((node.meta["layer"], node.meta["use"]), []).append(channels.reshape(len(channels), -1))
    return {key: np.concatenate(arrays, axis=1).mean(axis=1) for key, arrays in parts.items()}


def _largest_gap(a: dict[tuple[str, int], NDArray[Any]], b: dict[tuple[str, int], NDArray[Any]]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[key] - b[key]).max()) for key in a)


@pytest.mark.parametrize("spec", ["int2", "int4", "log4", "int1"])
@pytest.mark.parametrize("name", NAMES)
def test_means_are_the_float_networks(
    name: str, spec: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    prepared = networks[name]
    sample = images(prepared, 24)
    quantizer = Quantizer(prepared, sample)
    plan = uniform(WeightSpec.parse(spec))
    plain = quantizer.apply(plan).graph
    corrected = quantizer.apply(plan.with_changes(bias_correction=True))
    expected = _means(quantizer.float_graph, prepared, sample, record)
    assert _largest_gap(_means(plain, prepared, sample, record), expected) > 1e-3, "nothing to correct"
    assert _largest_gap(_means(corrected.graph, prepared, sample, record), expected) <= 1e-5
    assert set(corrected.quantized.biases) == set(expected)
    assert all(bias.dtype == torch.float32 and bias.ndim == 1 for bias in corrected.quantized.biases.values())


DENSE = [
    ("float[{o},{i}] w{n}", "d{n} = Gemm <transB = 1> ({x}, w{n})"),
    ("float[{o},{i}] w{n}, float[{o}] b{n}", "d{n} = Gemm <transB = 1> ({x}, w{n}, b{n})"),
    ("float[{o},{i}] w{n}, float[1,{o}] b{n}", "d{n} = Gemm <transB = 1> ({x}, w{n}, b{n})"),
    ("float[{i},{o}] w{n}, float[{o}] b{n}", "d{n} = Gemm ({x}, w{n}, b{n})"),
    ("float[{i},{o}] w{n}, float[1,{o}] b{n}", "d{n} = Gemm ({x}, w{n}, b{n})"),
    ("float[{i},{o}] w{n}", "d{n} = MatMul ({x}, w{n})"),
    ("float[{i},{o}] w{n}, float[{o}] b{n}", "m{n} = MatMul ({x}, w{n})\n d{n} = Add (m{n}, b{n})"),
]
"""Weights and nodes of every kind of dense layer."""


@st.composite
def _random_networks(draw: st.DrawFn) -> str:
    """A chain of convolutions, then of dense layers."""
    inputs = width = draw(st.sampled_from([2, 4]))
    weights, body, last = [], [], "x"
    for n in range(draw(st.integers(0, 3))):
        out, groups, bias = draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([1, 2])), draw(st.booleans())
        weights.append(f"float[{out},{width // groups},3,3] w{n}" + f", float[{out}] b{n}" * bias)
        pads = draw(st.sampled_from(["1,1,1,1", "0,0,2,2", "1,0,1,2"]))
        body.append(f"c{n} = Conv <pads = [{pads}], group = {groups}> ({last}, w{n}{f', b{n}' * bias})")
        body.append(f"r{n} = {draw(st.sampled_from(['Relu', 'Sigmoid']))} (c{n})")
        width, last = out, f"r{n}"
    body += [f"g = GlobalAveragePool ({last})", "f = Flatten (g)"]
    last = "f"
    for n in range(3, 3 + draw(st.integers(1, 2))):
        shapes, nodes = draw(st.sampled_from(DENSE))
        out = draw(st.integers(2, 5))
        weights.append(shapes.format(o=out, i=width, n=n))
        body.append(nodes.format(x=last, n=n))
        width, last = out, f"d{n}"
    lines = "\n    ".join([*body, f"y = Identity ({last})"])
    return f"(float[n,{inputs},6,6] x, {', '.join(weights)}) => (float[n,{width}] y) {{\n    {lines}\n}}"


@settings(max_examples=60)
@given(text=_random_networks(), spec=st.sampled_from(["int1", "int2", "int3:tensor", "log3"]), seed=st.integers(0, 99))
def test_means_of_random_networks(
    text: str, spec: str, seed: int, network: Network, images: Images, record: Record
) -> None:
    prepared = network(text)
    sample = images(prepared, 9, seed)
    quantizer = Quantizer(prepared, sample)
    corrected = quantizer.apply(uniform(WeightSpec.parse(spec), bias_correction=True))
    expected = _means(quantizer.float_graph, prepared, sample, record)
    assert _largest_gap(_means(corrected.graph, prepared, sample, record), expected) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "residual", "mlp", "shared", "static"])
def test_quantized_activations_are_corrected_for_too(
    name: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    prepared = networks[name]
    sample = images(prepared, 24)
    quantizer = Quantizer(prepared, sample)
    applied = quantizer.apply(uniform(INT2, ActivationSpec.parse("int3")))
    twin = copy.deepcopy(quantizer.float_graph)
    steps = (
        InsertWeightQuantizers(applied.quantized.weights),
        InsertActivationQuantizers(applied.quantized.activations),
        CorrectBiases(sample, quantizer.float_graph, prepared.batch or 64),
    )
    Pipeline(steps, quantizer.sample)(twin)
    expected = _means(quantizer.float_graph, prepared, sample, record)
    assert _largest_gap(_means(applied.graph, prepared, sample, record), expected) > 1e-2
    assert _largest_gap(_means(twin, prepared, sample, record), expected) <= 1e-5


def test_layers_that_stay_float_keep_their_bias(networks: dict[str, Prepared], images: Images, record: Record) -> None:
    prepared = networks["plain"]
    sample = images(prepared, 16)
    quantizer = Quantizer(prepared, sample)
    applied = quantizer.apply(Plan(weights={"w1": "int2"}, bias_correction=True))
    assert set(applied.quantized.biases) == {("w1", 0)}
    found = _means(applied.graph, prepared, sample, record)
    expected = _means(quantizer.float_graph, prepared, sample, record)
    assert np.abs(found["w1", 0] - expected["w1", 0]).max() <= 1e-5
    assert np.abs(found["w2", 0] - expected["w2", 0]).max() > 1e-4


@pytest.mark.parametrize("batch_size", [1, 5, 8, 64])
def test_the_batch_size_does_not_matter(batch_size: int, networks: dict[str, Prepared], images: Images) -> None:
    """A layer's mean is over all images, also where they run in several batches."""
    prepared = networks["residual"]
    sample = images(prepared, 16)
    found = {}
    for size in (16, batch_size):
        quantizer = Quantizer(prepared)
        twin = quantizer.float_graph
        reference = Quantizer(prepared).float_graph
        codes = {layer.name: quantizer.quantized_weight(layer, INT2) for layer in prepared.layers}
        InsertWeightQuantizers(codes)(twin)
        correct = CorrectBiases(sample, reference, size)
        correct(twin)
        found[size] = correct.biases
    for key, bias in found[16].items():
        torch.testing.assert_close(found[batch_size][key], bias, rtol=1e-5, atol=1e-6)


def test_a_static_batch_is_corrected_on_many_images(
    networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    """Not on one batch of two: the means over twenty images agree, and those over the last two need not."""
    prepared = networks["static"]
    sample = images(prepared, 21)
    quantizer = Quantizer(prepared, sample)
    applied = quantizer.apply(uniform(INT2, bias_correction=True))
    used = whole_batches(sample, 2)
    assert len(used) == 20
    expected, found = (_means(g, prepared, used, record) for g in (quantizer.float_graph, applied.graph))
    assert _largest_gap(found, expected) <= 1e-5
    expected, found = (_means(g, prepared, used[-2:], record) for g in (quantizer.float_graph, applied.graph))
    assert _largest_gap(found, expected) > 1e-3


def test_the_planted_mistake_of_correcting_all_layers_at_once(
    networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    """Means measured once, before anything is corrected, are wrong from the second layer on."""
    prepared = networks["plain"]
    sample = images(prepared, 16)
    quantizer = Quantizer(prepared, sample)
    plain = quantizer.apply(uniform(INT2))
    expected = _means(quantizer.float_graph, prepared, sample, record)
    shifted = _means(plain.graph, prepared, sample, record)
    for node in plain.graph.graph.nodes:
        if is_layer(node):
            key = (node.meta["layer"], node.meta["use"])
            plain.graph.get_buffer(str(node.args[2])).add_(torch.from_numpy(expected[key] - shifted[key]).float())
    found = _means(plain.graph, prepared, sample, record)
    assert np.abs(found["w1", 0] - expected["w1", 0]).max() <= 1e-5
    assert np.abs(found["w2", 0] - expected["w2", 0]).max() > 1e-3


def test_a_graph_without_codes_is_not_changed(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    twin = build_twin(prepared)
    Unshare()(twin)
    CanonicaliseLinear()(twin)
    result = CorrectBiases(images(prepared, 4), build_twin(prepared))(twin)
    assert (result.modified, result.notes) == (False, ())
