"""Real networks: the embedded example, and public ones where QOPT_ASSETS names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from qopt.emit import emit, integer_layers, integer_parts
from qopt.graph.load import load_model
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import Runner, to_bytes
from qopt.size import stored_bytes

KEPT = ("Relu", "Clip")
CODED = ("Conv", "Add", "GlobalAveragePool", "ReduceMean", "Flatten", "MaxPool", "Reshape")


@pytest.fixture(scope="session")
def example(examples: Path) -> Prepared:
    return prepare(load_model(examples / "fashion_resnet.pt"))


@pytest.fixture(scope="session")
def pictures(examples: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with np.load(examples / "fashion.npz") as data:
        return (data["x_test"][:500, None] / 255).astype(np.float32).reshape(-1, 1, 28, 28), data["y_test"][:500]


def ranges(prepared: Prepared, pixels: NDArray[np.float32], bits: int) -> dict[str, AffineRange]:
    """Codes for the input and for what every operator on the way writes, behind its ReLU: min and max observed."""
    names = [prepared.input]
    for node in prepared.model.graph:
        value = node.outputs[0]
        absorbed = [user for user in value.consumers() if user.op_type in KEPT]
        if value.is_graph_output() or (node.op_type not in CODED + KEPT) or (len(absorbed) == 1 == len(value.uses())):
            continue
        names.append(str(value.name))
    proto = onnx.load_from_string(to_bytes(prepared.model))
    known = {prepared.input, prepared.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip(names[1:], session.run(names[1:], {prepared.input: pixels}), strict=True))
    seen: dict[str, Any] = {prepared.input: pixels, **found}
    return {name: AffineRange.from_bounds(float(v.min()), float(v.max()), bits) for name, v in seen.items()}


def plain(data: bytes, name: str, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(None, {name: pixels})[0]
    return logits


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 8), ("log4", 4), ("int2", 4), ("int4:tensor", 3)])
def test_the_example_runs_on_integers_as_written(
    weights: str, bits: int, example: Prepared, pictures: Any, codes_of: Any
) -> None:
    """All ten layers fuse in any width, and ONNX Runtime's kernels give the codes that the unoptimised file gives."""
    pixels, _ = pictures
    quantized = Quantized(codes_of(example, weights), {}, ranges(example, pixels[:100], bits))
    assert integer_layers(example, quantized) == {layer.name for layer in example.layers}
    data = to_bytes(emit(example, quantized))
    onnx.checker.check_model(data, full_check=True)
    kernels = count_kernels(data)
    assert (kernels.integer, kernels.float_) == (10, 0)
    assert kernels.counts["QLinearConv"] == 9
    assert kernels.counts["QLinearAdd"] == 3
    logits, expected = Runner(data)(pixels), plain(data, example.input, pixels)
    assert (np.abs(logits - expected).max(axis=1) < 1e-4).mean() > 0.97
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.97  # few codes make ties


@pytest.mark.parametrize(("weights", "least"), [("int8", 99), ("int4", 95), ("log8", 97)])
def test_the_example_still_classifies(
    weights: str, least: float, example: Prepared, pictures: Any, codes_of: Any
) -> None:
    """Predictions in percent that weight-only and 8-bit activations leave as they were."""
    pixels, labels = pictures
    before = Runner(to_bytes(example.model))(pixels).argmax(1)
    assert 100 * (before == labels).mean() > 84
    for activations in ({}, ranges(example, pixels[:100], 8)):
        after = Runner(to_bytes(emit(example, Quantized(codes_of(example, weights), {}, activations))))(pixels)
        assert 100 * (after.argmax(1) == before).mean() >= least


def test_parts_are_what_the_float_graph_must_hold(example: Prepared, pictures: Any, codes_of: Any) -> None:
    """A float graph with the parts' weights and biases between the same codes is the integer file, to 1e-5."""
    pixels, _ = pictures
    quantized = Quantized(codes_of(example, "int4"), {}, ranges(example, pixels[:100], 4))
    parts = integer_parts(example, quantized)
    float_twin = example.model.clone()
    for layer in example.layers:
        part = parts[layer.name]
        for index, use in enumerate(layer.uses):
            assert use.bias is not None
            for name, array in (
                (layer.initializer, part.weight.dequantize().numpy()),
                (use.bias, part.biases[index].values),
            ):
                float_twin.graph.initializers[name].const_value = ir.tensor(array, name=name)
    rounded = Prepared(**{**vars(example), "model": float_twin})
    expected = plain(to_bytes(emit(rounded, Quantized({}, {}, quantized.activations))), example.input, pixels)
    logits = Runner(to_bytes(emit(example, quantized)))(pixels)
    assert (np.abs(logits - expected).max(axis=1) < 1e-4).mean() > 0.97


def test_the_file_shrinks(example: Prepared, codes_of: Any) -> None:
    before = len(to_bytes(example.model))
    sizes = {}
    for spec in ("int8", "int4", "int2"):
        quantized = Quantized(codes_of(example, spec))
        sizes[spec] = len(to_bytes(emit(example, quantized)))
        overhead = sizes[spec] - stored_bytes(quantized.stored(example))
        assert 0 < overhead < 20_000  # nodes, names, biases and the user's metadata
    assert sizes["int2"] < sizes["int4"] < sizes["int8"] < before / 3


def test_nothing_of_this_machine_is_in_the_file(example: Prepared, codes_of: Any) -> None:
    data = to_bytes(emit(example, Quantized(codes_of(example, "int4"))))
    for trace in (b"stack_trace", b".py", b"/home", b"site-packages", b"fx_node"):
        assert trace not in data


def test_latency_of_few_bits_is_that_of_eight(example: Prepared, pictures: Any, codes_of: Any) -> None:
    """4-bit activations once ran in float, three times slower: the kernels are the same but for clips on bytes."""
    pixels, _ = pictures
    counts = []
    for bits in (8, 4):
        data = to_bytes(emit(example, Quantized(codes_of(example, "int4"), {}, ranges(example, pixels[:50], bits))))
        counts.append(count_kernels(data).counts)
    assert counts[1].pop("Clip") == 14
    assert counts[1].pop("Transpose") <= counts[0].pop("Transpose") + 1
    assert counts[0] == counts[1]


@pytest.mark.assets
def test_public_networks(assets: Path, codes_of: Any) -> None:
    """Weight-only equals the float graph with dequantized weights; between codes, what is predicted to fuse fuses."""
    found = [path for path in sorted(assets.rglob("*.onnx")) if path.stat().st_size < 5e6]
    assert found
    for path in found:
        prepared = prepare(load_model(path))
        weights = codes_of(prepared, "int4")
        oracle = prepared.model.clone()
        for layer in prepared.layers:
            array = weights[layer.name].dequantize().numpy()
            oracle.graph.initializers[layer.initializer].const_value = ir.tensor(array, name=layer.initializer)
        shape = (prepared.batch or 2, *prepared.input_shape)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).numpy()
        logits = Runner(to_bytes(emit(prepared, Quantized(weights))), batch=prepared.batch)(pixels)
        assert np.allclose(logits, Runner(to_bytes(oracle), batch=prepared.batch)(pixels), rtol=1e-5, atol=1e-5)
        for bits in (8, 4):
            quantized = Quantized(weights, {}, ranges(prepared, pixels, bits))
            chosen = integer_layers(prepared, quantized)
            uses = sum(len(layer.uses) for layer in prepared.layers if layer.name in chosen)
            kernels = count_kernels(to_bytes(emit(prepared, quantized)))
            products = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in prepared.model.graph)
            others = products - sum(len(layer.uses) for layer in prepared.layers)  # attention: nobody predicts these
            assert uses <= kernels.integer <= uses + others
