from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qopt.emit.accumulator import fit_scales, smallest_scales
from qopt.emit.biases import bias_of
from qopt.emit.c import CProgram, emit_c
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.plan import uniform
from qopt.quant import AffineRange, QuantizedWeight, parts_of
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

Array = NDArray[Any]
Ints = NDArray[np.int64]

HARNESS = """#include "net.h"
#include <stdio.h>
int main(void)
{
    static uint8_t input[NET_INPUT_SIZE];
    static net_output output[NET_OUTPUT_SIZE];
    while (fread(input, 1, sizeof input, stdin) == sizeof input) {
        net_run(input, output);
        fwrite(output, 1, sizeof output, stdout);
    }
    return 0;
}
"""
FLAGS = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Wundef", "-Werror")


class Graph:
    """A small ONNX graph under construction, one image input called ``x`` and one output called ``logits``."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.generator = np.random.default_rng(seed)

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def random(self, name: str, *shape: int) -> str:
        return self.constant(name, (self.generator.standard_normal(shape) * 0.3).astype(np.float32))

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"node_{output}", **attributes))
        return output

    def conv(self, source: str, name: str, *weight: int, **attributes: Any) -> str:
        inputs = [source, self.random(f"{name}.weight", *weight), self.random(f"{name}.bias", weight[0])]
        return self.op("Conv", inputs, name, **attributes)

    def clip(self, source: str, output: str, low: float, high: float) -> str:
        bounds = [self.constant(f"{output}.{i}", np.float32(bound)) for i, bound in enumerate((low, high))]
        return self.op("Clip", [source, *bounds], output)

    def gemm(self, source: str, name: str, inputs: int, outputs: int) -> str:
        constants = [self.random(f"{name}.weight", outputs, inputs), self.random(f"{name}.bias", outputs)]
        return self.op("Gemm", [source, *constants], name, transB=1)

    def head(self, source: str) -> Graph:
        """Five logits from whatever ``source`` is."""
        self.op("Flatten", [source], "flat")
        inferred = onnx.shape_inference.infer_shapes(self.proto("n", "flat"), strict_mode=True).graph.output[0]
        self.gemm("flat", "logits", inferred.type.tensor_type.shape.dim[1].dim_value, 5)
        return self

    def proto(self, batch: int | str, output: str) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *self.shape])
        logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "user", [image], [logits], initializer=self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def prepared(self, batch: int | str = "n") -> Prepared:
        return prepare(ir.serde.deserialize_model(self.proto(batch, "logits")))


QUANTIZERS: dict[tuple[str, float], Quantizer] = {}


def quantize(prepared: Prepared, weights: str, activations: str = "int8", low: float = -1.0) -> Quantized:
    """All of a network in one format, calibrated on random images in [low, 1]."""
    key = (prepared.digest, low)
    if key not in QUANTIZERS:
        generator = torch.Generator().manual_seed(3)
        images = torch.rand(16, *prepared.input_shape, generator=generator) * (1 - low) + low
        QUANTIZERS[key] = Quantizer(prepared, images)
    return QUANTIZERS[key].apply(uniform(WeightSpec.parse(weights), ActivationSpec.parse(activations))).quantized


class Reference:
    """The formula of the C program in plain integers, node by node; written without the generator's code.

    Sums are taken in int64, levels read from the codes of every row alone.
    """

    def __init__(self, prepared: Prepared, quantized: Quantized, wide_scale: float) -> None:
        self.prepared, self.quantized, self.wide_scale = prepared, quantized, wide_scale
        self.uses = {use.output: (layer, i) for layer in prepared.layers for i, use in enumerate(layer.uses)}
        self.known: dict[str, tuple[Ints, AffineRange]] = {}

    def logits(self, codes: Ints, start: str = "") -> Ints:
        """Codes of the output for images in codes (n, ...) of the value ``start``, by default the input."""
        start = start or self.prepared.input
        self.known = {start: (codes, self.quantized.activations[start])}
        return self.value(self.prepared.model.graph.outputs[0])[0].reshape(len(codes), -1)

    def value(self, value: ir.Value) -> tuple[Ints, AffineRange]:
        name = str(value.name)
        if name not in self.known:
            bounds, node = [], producer(value)
            while node.op_type in ("Relu", "Clip") and str(first(node).name) not in self.quantized.activations:
                bounds.append(node)
                node = producer(first(node))
            own = self.quantized.activations.get(name)
            codes, code = self.node(node, own or AffineRange(self.wide_scale, 0, 8), own is None, bounds)
            if own is not None and own != code:  # views and largest codes, which keep those of their source
                codes = rounded([(codes - code.zero_point, code.scale / own.scale)])
                codes, code = self.clipped(codes, own, False, []), own
            self.known[name] = (codes, code)
        return self.known[name]

    def node(self, node: ir.Node, code: AffineRange, wide: bool, bounds: list[ir.Node]) -> tuple[Ints, AffineRange]:
        output = str(node.outputs[0].name)
        if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"):
            return self.view(node)
        if node.op_type in ("Slice", "Pad"):
            return self.moved(node)
        if output in self.uses:
            sums, unit = self.layer(node, *self.uses[output])
            ratios = unit / code.scale
            axis = 1 if node.op_type == "Conv" else sums.ndim - 1
            moved = np.moveaxis(sums, axis, 0)
            numbers = np.stack([rounded([(part, r)]) for part, r in zip(moved, ratios, strict=True)])
            return self.clipped(np.moveaxis(numbers, 0, axis), code, wide, bounds), code
        inputs = [v for v in node.inputs if v is not None]
        sources = [self.value(v) for v in inputs if v is inputs[0] or v.producer() is not None]
        terms = [(x - c.zero_point, c.scale / code.scale) for x, c in sources]
        if node.op_type == "Add":
            return self.clipped(rounded(terms), code, wide, bounds), code
        if node.op_type == "Concat":
            joined = np.concatenate([rounded([t]) for t in terms], node.attributes["axis"].as_int())
            return self.clipped(joined, code, wide, bounds), code
        if node.op_type in ("Relu", "Clip"):
            return self.clipped(rounded([terms[0]]), code, wide, [node]), code
        return self.pool(node, *sources[0], code, wide, bounds)

    def view(self, node: ir.Node) -> tuple[Ints, AffineRange]:
        codes, code = self.value(first(node))
        return codes.reshape(len(codes), *dims(node)[1:]), code

    def moved(self, node: ir.Node) -> tuple[Ints, AffineRange]:
        codes, code = self.value(first(node))
        given: list[list[int]] = [
            [] if v is None else self.prepared.initializer(str(v.name)).reshape(-1).tolist() for v in node.inputs[1:]
        ]
        given += [[]] * (4 - len(given))
        cuts, pads = [slice(None)] * codes.ndim, [(0, 0)] * codes.ndim
        if node.op_type == "Slice":
            for i, (start, end) in enumerate(zip(given[0], given[1], strict=True)):
                cuts[given[2][i] if given[2] else i] = slice(start, end, given[3][i] if given[3] else 1)
        else:
            for i, axis in enumerate(given[2] or range(codes.ndim)):
                pads[axis] = (given[0][i], given[0][len(given[0]) // 2 + i])
        return np.pad(codes[tuple(cuts)], pads, constant_values=code.zero_point), code

    def pool(
        self, node: ir.Node, codes: Ints, before: AffineRange, code: AffineRange, wide: bool, bounds: list[ir.Node]
    ) -> tuple[Ints, AffineRange]:
        if "Pool" not in node.op_type or "Global" in node.op_type:
            size = int(np.prod(codes.shape[2:]))
            flat = codes.reshape(*codes.shape[:2], size)
            if "Max" in node.op_type:
                return flat.max(2).reshape(*codes.shape[:2], *[1] * (codes.ndim - 2)), before
            means = rounded([(flat.sum(2) - size * before.zero_point, before.scale / code.scale / size)])
            keeps = node.op_type != "ReduceMean" or node.attributes["keepdims"].as_int()
            shape = (*means.shape, *[1] * (codes.ndim - 2)) if keeps else means.shape
            return self.clipped(means, code, wide, bounds).reshape(shape), code
        missing = -1 if node.op_type == "MaxPool" else before.zero_point
        kernel = list(node.attributes["kernel_shape"].as_ints())
        seen = np.stack(list(windows(node, codes, kernel, missing).values()))
        if node.op_type == "MaxPool":
            return seen.max(0), before
        number = np.stack(list(windows(node, np.ones_like(codes), kernel, 0).values())).sum(0)
        counts = node.attributes.get("count_include_pad")
        number = np.full_like(number, np.prod(kernel)) if counts is not None and counts.as_int() else number
        total = (seen - before.zero_point).sum(0)
        means = np.zeros_like(total)
        for n in np.unique(number):
            means = np.where(number == n, rounded([(total, before.scale / code.scale / int(n))]), means)
        return self.clipped(means, code, wide, bounds), code

    def layer(self, node: ir.Node, layer: Any, index: int) -> tuple[Ints, Array]:
        """Sums with bias, and what one stands for in each channel."""
        codes, before = self.value(first(node if node.op_type != "Add" else self.product(node)))
        bias = bias_of(self.prepared, layer, index, self.quantized)
        bias = np.zeros(layer.channels, np.float32) if bias is None else bias
        fitted = fit_scales(self.quantized.weights[layer.name], smallest_scales([(bias, before)], layer.channels))
        levels, unit = np.zeros(layer.shape, np.int64).swapaxes(0, layer.channel_axis), np.zeros(layer.channels)
        for part, members in parts_of(fitted):
            for row, channel in enumerate(members.tolist()):
                levels[channel], unit[channel] = one_row(part, row, before.scale)
        offset = np.rint(bias / unit).astype(np.int64)
        x = codes - before.zero_point
        if layer.op != "Conv":
            return x.reshape(*x.shape[:-1], -1) @ levels.reshape(layer.channels, -1).T + offset, unit
        kernel = levels.shape[2:]
        taps = windows(node, x, list(kernel), 0)
        groups, per = layer.groups, layer.channels // layer.groups
        parts = []
        for g in range(groups):
            w, wide = levels[g * per : (g + 1) * per], levels.shape[1]
            cut = slice(g * wide, (g + 1) * wide)
            seen = np.stack([tap[:, cut] for tap in taps.values()], 2)
            parts.append(np.einsum("ock,nck...->no...", w.reshape(per, wide, -1), seen))
        return np.concatenate(parts, 1) + offset.reshape(-1, *[1] * len(kernel)), unit

    def product(self, add: ir.Node) -> ir.Node:
        return next(node for v in add.inputs if v is not None and (node := v.producer()) is not None)

    def number(self, value: ir.Value | None) -> float:
        assert value is not None
        return float(self.prepared.initializer(str(value.name)))

    def clipped(self, numbers: Ints, code: AffineRange, wide: bool, bounds: list[ir.Node]) -> Ints:
        low, high = (-(2**24), 2**24) if wide else (0, code.largest_code)
        for node in bounds:
            ends = [0.0, np.inf] if node.op_type == "Relu" else [self.number(v) for v in node.inputs[1:]]
            codes = [round(end / code.scale) + code.zero_point if np.isfinite(end) else high for end in ends]
            low, high = min(max(low, codes[0]), high), max(min(high, codes[1]), low)
        return np.clip(numbers + code.zero_point, low, high)


def producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def first(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def dims(node: ir.Node) -> list[int]:
    """Sizes of the output; 0 for the batch."""
    shape = node.outputs[0].shape
    assert shape is not None
    return [size if isinstance(size, int) else 0 for size in shape]


def one_row(part: QuantizedWeight, row: int, input_scale: float) -> tuple[Ints, float]:
    """Integer levels of one output channel, and what one of them times one input code stands for."""
    scale = np.float32(part.scale[row] if part.scale.ndim else part.scale)
    multiples = part.codes if part.table is None else part.table.to(torch.float64)[part.codes.to(torch.int64)]
    weights = np.moveaxis(multiples.to(torch.float64).numpy(), part.axis, 0)[row]
    smallest = 1.0
    if part.spec.quantizer == "log":
        assert part.table is not None
        used = part.table.to(torch.float64).numpy() if part.spec.bits <= 4 else weights
        smallest = float(np.abs(used[used != 0]).min()) if (used != 0).any() else 1.0
    return np.rint(weights / smallest).astype(np.int64), float(scale * np.float32(input_scale)) * smallest


def rounded(terms: list[tuple[Ints, float]]) -> Ints:
    """Sum of integers times mantissas, by 2**shift, halves away from zero.

    The shift is the largest, up to 62, at which no mantissa needs more than 31 bits beside its sign.
    """
    shift = 62
    while any(round(abs(ratio) * 2.0**shift) >= 2**31 for _, ratio in terms):
        shift -= 1
    assert all(np.abs(numbers).max() < 2**31 for numbers, _ in terms)
    total = np.sum([numbers * round(ratio * 2.0**shift) for numbers, ratio in terms], axis=0)
    return np.asarray(np.sign(total) * ((np.abs(total) + 2 ** (shift - 1)) // 2**shift), np.int64)


def windows(node: ir.Node, x: Ints, kernel: list[int], missing: int) -> dict[tuple[int, ...], Ints]:
    """For every place in the kernel what it sees at each output position; ``missing`` over the border."""
    axes = len(kernel)
    given = {name: list(a.as_ints()) for name, a in node.attributes.items() if name in ("strides", "pads", "dilations")}
    strides, dilations = given.get("strides", [1] * axes), given.get("dilations", [1] * axes)
    out = dims(node)[2:]
    pads = given.get("pads", [0] * 2 * axes)
    if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string().startswith("SAME"):
        upper = node.attributes["auto_pad"].as_string() == "SAME_UPPER"
        sizes = zip(out, strides, kernel, x.shape[2:], strict=True)
        total = [(o - 1) * s + k - size for o, s, k, size in sizes]
        pads = [t // 2 if upper else t - t // 2 for t in total] + [t - t // 2 if upper else t // 2 for t in total]
    reach = [max((o - 1) * s + (k - 1) * d + 1, 0) for o, s, k, d in zip(out, strides, kernel, dilations, strict=True)]
    more = [max(r - size - pads[i], pads[axes + i]) for i, (r, size) in enumerate(zip(reach, x.shape[2:], strict=True))]
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], more, strict=True)], constant_values=missing)
    found = {}
    for at in np.ndindex(*kernel):
        starts = [place * d for place, d in zip(at, dilations, strict=True)]
        cut = [slice(b, b + (o - 1) * s + 1, s) for b, o, s in zip(starts, out, strides, strict=True)]
        found[at] = padded[(slice(None), slice(None), *cut)]
    return found


class Compiled:
    """A program that gcc has compiled, in a folder of its own."""

    def __init__(self, program: CProgram, folder: Path, flags: Sequence[str]) -> None:
        self.program, self.folder = program, folder
        for name, text in (("net.h", program.header), ("net.c", program.source), ("self_test.c", program.self_test)):
            (folder / name).write_text(text, encoding="ascii")
        (folder / "harness.c").write_text(HARNESS)
        self.flags = (*FLAGS, *flags)
        self.binary = self.link("harness.c")

    def link(self, main: str) -> Path:
        binary = self.folder / main.removesuffix(".c")
        command = ["gcc", *self.flags, "-o", str(binary), "net.c", main]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return binary

    def __call__(self, codes: Array) -> Ints:
        """Output codes (n, outputs) for images in codes (n, ...)."""
        feed = np.asarray(codes, np.uint8).tobytes()
        result = subprocess.run([self.binary], input=feed, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr.decode()
        output = self.program.network.output
        kind = np.int32 if output.code.wide else np.uint8
        return np.frombuffer(result.stdout, kind).reshape(len(codes), output.size).astype(np.int64)

    def self_test(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.link("self_test.c")], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def gcc() -> str:
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("gcc is not installed")
    return found


@pytest.fixture
def compiled(gcc: str, tmp_path: Path) -> Callable[..., Compiled]:
    def build(program: CProgram, *flags: str) -> Compiled:
        return Compiled(program, tmp_path, flags or ("-O2",))

    return build


@pytest.fixture
def check(compiled: Callable[..., Compiled]) -> Callable[..., CProgram]:
    """Compile a network and compare it with the reference, code for code, on random images in codes."""

    def run(prepared: Prepared, quantized: Quantized, *flags: str, count: int = 6, varied: bool = True) -> CProgram:
        program = emit_c(prepared, quantized, name="net")
        largest = quantized.activations[prepared.input].largest_code
        codes = np.random.default_rng(5).integers(0, largest + 1, (count, *prepared.input_shape))
        codes[0], codes[1] = 0, largest
        expected = Reference(prepared, quantized, program.network.output.code.scale).logits(codes)
        assert not varied or np.ptp(expected) > 0, "outputs that are all equal show nothing"
        assert np.array_equal(compiled(program, *flags)(codes), expected)
        assert np.array_equal(program.run(codes[2].astype(np.uint8)), expected[2])
        return program

    return run


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


@pytest.fixture(scope="session")
def graph() -> type[Graph]:
    return Graph


@pytest.fixture(scope="session")
def quantized() -> Callable[..., Quantized]:
    return quantize
