"""Where every tensor lies in the arena: liveness over the execution order, in-place steps, best-fit offsets.

The network's input and output are the caller's and not in the arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from qopt.emit.c.steps import AddStep, AverageStep, LayerStep, MaxStep, Network, RescaleStep, Step, Tensor, sources_of


@final
@dataclass(frozen=True)
class Buffer:
    """Bytes that are needed from step ``first`` to step ``last``, both included."""

    name: str
    bytes: int
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        """Whether both are needed at one time."""
        return self.first <= other.last and other.first <= self.last


@final
@dataclass(frozen=True)
class Memory:
    """A layout of the arena.

    Attributes:
        tensors: root name of every tensor in the arena to its offset in bytes.
        scratch: number of a step to the offset of its scratch memory.
        buffers: what was placed; tensors that share memory in place are one buffer.
        arena_bytes: size of the arena.
    """

    tensors: Mapping[str, int]
    scratch: Mapping[int, int]
    buffers: tuple[Buffer, ...]
    arena_bytes: int

    @property
    def least_bytes(self) -> int:
        """The most that any step needs at once: no layout is smaller."""
        last = max((buffer.last for buffer in self.buffers), default=-1)
        steps = range(last + 1)
        return max((sum(b.bytes for b in self.buffers if b.first <= i <= b.last) for i in steps), default=0)


def lay_out(network: Network) -> Memory:
    """Offsets for all tensors and scratch memory of ``network``."""
    last_read = {tensor.root: i for i, step in enumerate(network.steps) for tensor in sources_of(step)}
    outside = {network.input.root, network.output.root}
    owner: dict[str, str] = {}
    buffers: dict[str, Buffer] = {}
    for i, step in enumerate(network.steps):
        root = step.target.root
        if root not in outside:
            last = max(last_read.get(root, i), i)
            taken = next((t for t in _replaceable(step) if t.root in owner and last_read[t.root] == i), None)
            owner[root] = owner[taken.root] if taken else root
            old = buffers.get(owner[root], Buffer(root, step.target.size, i, last))
            buffers[owner[root]] = Buffer(old.name, old.bytes, old.first, last)
        if isinstance(step, LayerStep) and step.scratch:
            buffers[f"scratch {i}"] = Buffer(f"scratch {i}", step.scratch, i, i)
    placed = place(list(buffers.values()))
    return Memory(
        {root: placed[name] for root, name in owner.items()},
        {i: placed[f"scratch {i}"] for i in range(len(network.steps)) if f"scratch {i}" in placed},
        tuple(buffers.values()),
        max((placed[buffer.name] + buffer.bytes for buffer in buffers.values()), default=0),
    )


def place(buffers: Sequence[Buffer]) -> dict[str, int]:
    """Offsets by name, the largest buffer first, each in the tightest gap that holds it."""
    offsets: dict[str, int] = {}
    done: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.first, b.name)):
        taken = sorted((offsets[b.name], offsets[b.name] + b.bytes) for b in done if b.meets(buffer))
        gaps = [(end - start, start) for start, end in _gaps(taken) if end - start >= buffer.bytes]
        offsets[buffer.name] = min(gaps)[1] if gaps else max((end for _, end in taken), default=0)
        done.append(buffer)
    return offsets


def _gaps(taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    end = 0
    for start, stop in taken:
        if start > end:
            yield end, start
        end = max(end, stop)


def _replaceable(step: Step) -> tuple[Tensor, ...]:
    """Sources that the step may overwrite while it reads them: it writes no element before it has read it.

    A window without padding begins at or behind the place of its output, so pooling may work in place too.
    """
    if isinstance(step, AddStep):
        return (step.a, step.b)
    if isinstance(step, RescaleStep):
        return (step.source,)
    if isinstance(step, (MaxStep, AverageStep)):
        window = step.window
        unpadded = window.pad_top == window.pad_left == 0
        shrinks = window.out_height <= window.height and window.out_width <= window.width
        return (step.source,) if unpadded and shrinks else ()
    return ()
