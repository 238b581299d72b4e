"""The arena: liveness recomputed from the steps, no two live tensors in one place, work in place."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.emit.c import CProgram, emit_c
from qopt.emit.c.memory import Buffer, place
from qopt.emit.c.steps import LayerStep, sources_of


def lives(program: CProgram) -> dict[str, tuple[int, int, int]]:
    """Name of every piece of memory in the arena to size, first and last step; tensors that share it apart."""
    found: dict[str, tuple[int, int, int]] = {}
    outside = (program.network.input.root, program.network.output.root)
    for i, step in enumerate(program.network.steps):
        for tensor in (*sources_of(step), step.target):
            if tensor.root not in outside:
                size, first, _ = found.get(tensor.root, (tensor.size, i, i))
                found[tensor.root] = (size, first, i)
        if isinstance(step, LayerStep) and step.scratch:
            found[f"scratch {i}"] = (step.scratch, i, i)
    return found


def offset(program: CProgram, name: str) -> int:
    number = re.fullmatch(r"scratch (\d+)", name)
    return program.memory.scratch[int(number[1])] if number else program.memory.tensors[name]


def check_layout(program: CProgram) -> int:
    """Nothing overlaps but a step's source with its target; returns the peak that sharing leaves."""
    pieces = lives(program)
    replaced = {(s.root, step.target.root) for step in program.network.steps for s in sources_of(step)}
    for name, (size, first, last) in pieces.items():
        begin = offset(program, name)
        assert 0 <= begin <= begin + size <= program.arena_bytes
        for other, (other_size, other_first, other_last) in pieces.items():
            start = offset(program, other)
            meet = first <= other_last and other_first <= last
            if name < other and meet and begin < start + other_size and start < begin + size:
                assert (name, other) in replaced or (other, name) in replaced
                assert last == other_first or other_last == first
                assert begin == start
    peaks = []
    for i in range(len(program.network.steps)):
        taken: dict[int, int] = {}
        for name, (size, first, last) in pieces.items():
            if first <= i <= last:
                taken[offset(program, name)] = max(taken.get(offset(program, name), 0), size)
        peaks.append(sum(taken.values()))
    return max(peaks)


def test_a_chain_needs_two_neighbours_at_a_time(graph: Any, quantized: Any) -> None:
    g = graph(2, 16, 16)
    for i, (before, after) in enumerate([(2, 6), (6, 4), (4, 8), (8, 2)]):
        g.op("Relu", [g.conv("x" if i == 0 else f"r{i - 1}", f"c{i}", after, before, 3, 3, pads=[1] * 4)], f"r{i}")
    prepared = g.head("r3").prepared()
    program = emit_c(prepared, quantized(prepared, "int8"), name="net")
    scratch = [step.scratch for step in program.network.steps if isinstance(step, LayerStep)]
    assert max(scratch) <= 4096 + 8 * 9
    assert scratch[-1] == 0  # 8-bit rows of a product are multiplied where they lie
    sizes = [256 * n for n in (6, 4, 8, 2)]
    first = max(s + a + b for s, a, b in zip(scratch, [0, *sizes], [*sizes, 0], strict=True))
    assert program.arena_bytes == program.memory.least_bytes == check_layout(program) == first
    assert f"#define NET_ARENA_BYTES {first} " in program.header
    assert "static uint8_t arena[NET_ARENA_BYTES];" in program.source


def test_sums_and_pools_work_in_place(graph: Any, quantized: Any) -> None:
    g = graph(4, 12, 12)
    g.op("Relu", [g.conv("x", "a", 8, 4, 3, 3, pads=[1] * 4)], "ar")
    g.op("Add", [g.conv("ar", "b", 8, 8, 3, 3, pads=[1] * 4), "ar"], "sum")
    g.op("MaxPool", ["sum"], "p", kernel_shape=[2, 2], strides=[2, 2])
    g.op("AveragePool", ["p"], "q", kernel_shape=[3, 3], pads=[1] * 4)
    prepared = g.head("q").prepared()
    program = emit_c(prepared, quantized(prepared, "int8"), name="net")
    places = program.memory.tensors
    assert places["sum"] in (places["b"], places["ar"])
    assert places["p"] == places["sum"]
    assert places["q"] != places["p"]  # padded windows reach back behind what is written
    assert check_layout(program) == program.memory.least_bytes


def test_a_tensor_that_is_read_again_is_kept(graph: Any, quantized: Any, check: Any) -> None:
    """Two sums read the same tensor: the first may not overwrite it."""
    g = graph(4, 8, 8)
    a, b = (g.conv("x", name, 4, 4, 3, 3, pads=[1] * 4) for name in "ab")
    g.op("Add", [a, b], "first")
    g.op("Add", ["first", a], "second")
    g.op("Add", ["second", "second"], "third")
    g.op("Add", ["third", a], "fourth")
    prepared = g.head("fourth").prepared()
    program = check(prepared, quantized(prepared, "int8"))
    places = program.memory.tensors
    assert places["first"] == places["b"] != places["a"]
    assert places["third"] == places["second"] == places["first"]
    check_layout(program)


def test_no_memory_at_all(graph: Any, quantized: Any, check: Any) -> None:
    g = graph(12)
    g.gemm("x", "logits", 12, 4)
    program = check(g.prepared(), quantized(g.prepared(), "int8"))
    assert program.arena_bytes == 0
    assert "arena[" not in program.source


BUFFERS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=12)


@given(shapes=BUFFERS)
def test_live_buffers_never_overlap(shapes: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(f"b{i}", size, first, first + more) for i, (size, first, more) in enumerate(shapes)]
    offsets = place(buffers)
    for buffer in buffers:
        for other in buffers:
            if buffer is not other and buffer.meets(other):
                a, b = offsets[buffer.name], offsets[other.name]
                assert a + buffer.bytes <= b or b + other.bytes <= a
    peak = max(sum(b.bytes for b in buffers if b.first <= i <= b.last) for i in range(15))
    end = max(offsets[b.name] + b.bytes for b in buffers)
    assert peak <= end <= sum(b.bytes for b in buffers)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_tightest_gap(order: tuple[int, ...]) -> None:
    big, middle, small = Buffer("big", 10, 0, 9), Buffer("middle", 6, 0, 1), Buffer("small", 4, 2, 3)
    offsets = place([(big, middle, small)[i] for i in order])
    assert offsets == {"big": 0, "middle": 10, "small": 10}
