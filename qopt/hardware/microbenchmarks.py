"""Small networks that `measured:host` times in ONNX Runtime, in float and in codes, to learn what operators cost.

Operators are timed in context: whole networks of a few operators, whose costs a regression takes apart. Timed alone,
ONNX Runtime's changes of layout around an operator cost more than many operators do (a uint8 MaxPool took 3.4 ms by
itself and nothing behind a convolution). Channels are multiples of 16, as those of networks are: kernels are made for
them. Time is CPU time of the process on one thread, the least of batches that are repeated until it no longer falls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.runtime.session import open_session, to_bytes
from qopt.runtime.values import constant

BATCH_SECONDS: Final = 4e-3
"""CPU seconds of one batch of runs, thousands of ticks of the clock."""

PATIENCE: Final = 12
"""Batches without a time that is lower by `BETTER` after which the lowest counts as stable."""

BETTER: Final = 0.995
MOST_SECONDS: Final = 1.5
"""CPU seconds for one network in one pass, stable or not."""

MOST_PASSES: Final = 4
STABLE: Final = 0.97
FALLEN: Final = 0.1
"""Passes through all networks, at most; they end where of all but this share no time fell below `STABLE` of itself."""

SCALE: Final = np.float32(1 / 64)
OPSET: Final = 21


@final
@dataclass(frozen=True)
class Op:
    """One operator of a benchmark: ``conv``, ``add`` (what entered the last ``back`` convolutions), ``max``, ``mean``,
    ``gemm``."""

    kind: str
    channels: int = 0
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    back: int = 1


@final
@dataclass(frozen=True)
class Benchmark:
    """One network: channels and side of its image, and its operators."""

    channels: int
    side: int
    ops: tuple[Op, ...]

    def model(self, *, codes: bool) -> ir.Model:
        """The network in float32, or with 8-bit codes on both sides of all that has kernels for them."""
        return _Builder(self, codes).model()

    @property
    def image(self) -> NDArray[np.float32]:
        """One image in [0, 1)."""
        return np.random.default_rng(0).random((1, self.channels, self.side, self.side), dtype=np.float32)


def benchmarks() -> tuple[Benchmark, ...]:
    """The networks: a stem, what is to be learnt about, and a classifier, over the sizes that networks have.

    All begin with few channels and end in few numbers: at both ends ONNX Runtime changes the layout of tensors.
    """
    stems = ((1, 28, 16, 3, 2), (1, 28, 32, 5, 1), (3, 32, 16, 3, 1), (3, 32, 64, 3, 1), (3, 112, 32, 3, 2),
             (3, 224, 64, 7, 2))  # fmt: skip
    found = [
        _network(colours, side, Op("conv", channels, kernel, stride), body)
        for colours, side, channels, kernel, stride in stems
        for body in ((), (Op("max", kernel=3, stride=2), Op("conv", channels)))
    ]
    for channels, side in SIZES:
        stem = Op("conv", channels, 3)
        found += [_network(3, side, stem, body) for body in _bodies(channels)]
    return tuple(found)


SIZES: Final = (
    (16, 32), (16, 14), (32, 16), (32, 28), (64, 8), (64, 28), (64, 56), (128, 7), (128, 14), (128, 28), (256, 7),
    (256, 14), (512, 7),
)  # fmt: skip
"""Channels and sides of what convolutions are timed on."""


def _bodies(channels: int) -> Iterator[tuple[Op, ...]]:
    """Chains of one kind each, with few and many of it."""
    same, point = Op("conv", channels), Op("conv", channels, kernel=1)
    yield (same,)
    yield (same,) * 4
    yield (point,) * 4
    yield (same, same, Op("add", back=2)) * 2
    if channels <= 256:
        yield Op("conv", 2 * channels, stride=2), Op("conv", 2 * channels)
        yield Op("conv", 2 * channels, kernel=1, stride=2), Op("conv", 2 * channels)
        yield point, Op("conv", channels, groups=channels), point, Op("conv", channels, groups=channels)
    if channels <= 128:
        yield Op("conv", 4 * channels, kernel=1), point, Op("conv", 4 * channels, kernel=1), point
    if channels >= 256:
        yield point, Op("mean"), Op("gemm", 1000), Op("gemm", channels)


def _network(colours: int, side: int, stem: Op, body: tuple[Op, ...]) -> Benchmark:
    flat = any(op.kind == "gemm" for op in body)
    return Benchmark(colours, side, (stem, *body, *(() if flat else (Op("mean"),)), Op("gemm", 10)))


Clock = Callable[[], float]


def open_call(benchmark: Benchmark, *, codes: bool) -> Callable[[], object]:
    """One run of a benchmark in a session of its own."""
    session = open_session(to_bytes(benchmark.model(codes=codes)))
    return partial(session.run, None, {session.get_inputs()[0].name: benchmark.image})


def lowest_times(
    calls: Sequence[Callable[[], object]], clock: Clock = time.process_time, most: int = MOST_PASSES
) -> NDArray[np.float64]:
    """The least seconds of every call, over passes through all of them that go on until none brings much less.

    A slow moment of the machine lasts longer than one call's batches, and does not last for a whole pass.
    """
    best = np.array([stable_seconds(call, clock) for call in calls])
    for _ in range(most - 1):
        again = np.minimum(best, [stable_seconds(call, clock) for call in calls])
        stable = np.quantile(again / best, FALLEN) >= STABLE
        best = again
        if stable:
            break
    return best


def stable_seconds(call: Callable[[], object], clock: Clock = time.process_time) -> float:
    """The least seconds of one call by ``clock``, over batches that go on until `PATIENCE` of them bring no less."""
    call()
    began = clock()
    call()
    runs = max(1, round(BATCH_SECONDS / max(clock() - began, 1e-6)))
    best, since, start = float("inf"), 0, clock()
    while since < PATIENCE and clock() - start < MOST_SECONDS:
        began = clock()
        for _ in range(runs):
            call()
        seconds = (clock() - began) / runs
        since = 0 if seconds < best * BETTER else since + 1
        best = min(best, seconds)
    return best


@final
class _Builder:
    """The nodes of one benchmark; with codes, every tensor passes QuantizeLinear and DequantizeLinear."""

    def __init__(self, benchmark: Benchmark, codes: bool) -> None:
        self._benchmark, self._codes = benchmark, codes
        self._rng = np.random.default_rng(0)
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}

    def model(self) -> ir.Model:
        benchmark = self._benchmark
        shape = ir.Shape([1, benchmark.channels, benchmark.side, benchmark.side])
        image = ir.Value(name="image", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        value, channels, entered = self._coded(image), benchmark.channels, list[ir.Value]()
        for op in benchmark.ops:
            if op.kind in ("conv", "gemm"):
                entered.append(value)
                value, channels = self._layer(op, value, channels), op.channels
            elif op.kind == "add":
                value = self._coded(self._node("Relu", [self._node("Add", [value, entered[-op.back]])]))
            elif op.kind == "max":
                pads = {"kernel_shape": [op.kernel] * 2, "strides": [op.stride] * 2, "pads": [op.kernel // 2] * 4}
                value = self._coded(self._node("MaxPool", [value], pads))
            else:
                value = self._coded(self._node("GlobalAveragePool", [value]))
                value = self._coded(self._node("Flatten", [value], {"axis": 1}))
        value.name, value.type = "output", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [image], [value], nodes=self._nodes, initializers=list(self._constants.values()),
            opset_imports={"": OPSET}, name="benchmark",
        )  # fmt: skip
        return ir.Model(graph, ir_version=10)

    def _layer(self, op: Op, value: ir.Value, channels: int) -> ir.Value:
        shape = (op.channels, channels) if op.kind == "gemm" else (op.channels, channels // op.groups, *[op.kernel] * 2)
        taps = int(np.prod(shape[1:]))
        weight, bias = self._weight(shape, taps), self._bias(op)
        if op.kind == "gemm":
            return self._coded(self._node("Gemm", [value, weight, bias], {"transB": 1}))
        attributes = {"strides": [op.stride] * 2, "pads": [op.kernel // 2] * 4, "group": op.groups}
        return self._coded(self._node("Relu", [self._node("Conv", [value, weight, bias], attributes)]))

    def _weight(self, shape: tuple[int, ...], taps: int) -> ir.Value:
        if not self._codes:
            return self._constant((self._rng.normal(size=shape) * np.sqrt(2 / taps)).astype(np.float32))
        codes = self._rng.integers(-63, 64, shape).astype(np.int8)
        scales = np.full(shape[0], 1 / (32 * np.sqrt(taps)), np.float32)
        zeros = np.zeros(shape[0], np.int8)
        values = [self._constant(array) for array in (codes, scales, zeros)]
        return self._node("DequantizeLinear", values, {"axis": 0})

    def _bias(self, op: Op) -> ir.Value:
        """In float, which ONNX Runtime quantizes itself for a convolution, not for a matrix product."""
        zeros = np.zeros(op.channels, np.int32)
        if not self._codes or op.kind == "conv":
            return self._constant(zeros.astype(np.float32))
        arrays = zeros, np.full(op.channels, SCALE, np.float32)
        return self._node("DequantizeLinear", [self._constant(array) for array in arrays], {"axis": 0})

    def _coded(self, value: ir.Value) -> ir.Value:
        if not self._codes:
            return value
        code = [self._constant(SCALE), self._constant(np.uint8(0))]
        return self._node("DequantizeLinear", [self._node("QuantizeLinear", [value, *code]), *code])

    def _node(self, op: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
        node = ir.node(op, inputs, attributes or {}, name=f"{op}_{len(self._nodes)}")
        self._nodes.append(node)
        node.outputs[0].name = f"value_{len(self._nodes)}"
        return node.outputs[0]

    def _constant(self, array: NDArray[Any] | np.generic) -> ir.Value:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = constant(name, array)
        return self._constants[name]
