"""The activation shift of Bernhard et al. 2019, on values that a float network and a quantized one have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.attacks import Shift, activation_shift
from qopt.graph.operators.quantization import quantized, quantized_by_own_range
from qopt.measure.network import TwinClassifier
from qopt.passes.watcher import Watcher

CHUNK: Final = 8
"""Images whose activations are held at a time."""

CLIPS: Final = ("Relu", "Clip")
"""Operators that quantization by a range may stand for."""


@final
@dataclass(frozen=True, eq=False)
class Pair:
    """One value of the float network, and what the operators after it read instead in the quantized one."""

    value: str
    plain: Node
    rounded: Node


@final
@dataclass(frozen=True)
class Shifts:
    """``values``, the shift of every value that both networks have, by its name in the float one; ``quantized``, how
    many values the second quantizes.
    """

    values: dict[str, Shift]
    quantized: int

    @property
    def rate(self) -> float:
        """Over all values, in [0, 1]."""
        pairs = sum(shift.pairs for shift in self.values.values())
        return sum(shift.rate * shift.pairs for shift in self.values.values()) / max(pairs, 1)


def pair_values(plain: GraphModule, rounded: GraphModule) -> tuple[list[Pair], int]:
    """The values that ``rounded`` quantizes and ``plain`` has under the same name, and how many the former are.

    A file may leave out a ReLU because the range of its codes clips the same: where ``rounded`` has no value called
    like that ReLU's output, the output is what its codes stand for.
    """
    by_name = {node.meta["value"]: node for node in plain.graph.nodes if "value" in node.meta and _computed(node)}
    known = {node.meta.get("value") for node in rounded.graph.nodes}
    pairs: dict[str, Pair] = {}
    sources = dict.fromkeys(node.args[0] for node in rounded.graph.nodes if _quantizes(node))
    for source in sources:
        if not isinstance(source, Node) or source.meta.get("value") not in by_name:
            continue
        reader = next(user for user in source.users if _quantizes(user))
        found = _after_clips(by_name[source.meta["value"]], known)
        pairs[found.meta["value"]] = Pair(found.meta["value"], found, _numbers(reader))
    return list(pairs.values()), len(sources)


def activation_shifts(plain: TwinClassifier, rounded: TwinClassifier, images: Tensor) -> Shifts:
    """The shift of every value in common on ``images`` (n, ...); both networks are their files' twins.

    Values whose shapes differ, or that have no row per image, are left out.
    """
    pairs, count = pair_values(plain.graph, rounded.graph)
    found: dict[str, list[Shift]] = {}
    for chunk in torch.split(images, CHUNK):
        floats = _record(plain, chunk, [pair.plain for pair in pairs])
        codes = _record(rounded, chunk, [pair.rounded for pair in pairs])
        for pair in pairs:
            before, after = floats.get(pair.plain.name), codes.get(pair.rounded.name)
            if before is not None and after is not None and before.shape == after.shape and before.ndim > 1:
                found.setdefault(pair.value, []).append(activation_shift(before, after))
    chunks = len(range(0, len(images), CHUNK))
    whole = {name: parts for name, parts in found.items() if len(parts) == chunks}
    return Shifts({name: _together(parts, len(images)) for name, parts in whole.items()}, count)


def _together(parts: Sequence[Shift], images: int) -> Shift:
    """Of chunks, all of `CHUNK` images but the last one."""
    pairs = sum(part.pairs for part in parts)
    undone = sum(round(part.rate * part.pairs) for part in parts)
    sizes = [min(CHUNK, images - start) for start in range(0, images, CHUNK)]
    hit = sum(round(part.images * size) for part, size in zip(parts, sizes, strict=True))
    return Shift(undone / max(pairs, 1), pairs, hit / images)


def _quantizes(node: Node) -> bool:
    """Whether a node turns an activation into codes."""
    if node.target not in (quantized, quantized_by_own_range):
        return False
    return isinstance(node.args[0], Node) and _computed(node.args[0])


def _computed(node: Node) -> bool:
    return node.op != "get_attr"


def _numbers(quantizer: Node) -> Node:
    """The numbers that a quantizer's codes stand for; the codes themselves where no DequantizeLinear follows."""
    node = quantizer
    if node.target is quantized_by_own_range:
        node = next((user for user in node.users if user.args[1] == 0), node)
    while True:
        following = next((user for user in node.users if user.args[0] is node), None)
        if following is None or following.meta.get("op") not in ("Clip", "DequantizeLinear"):
            return node
        node = following
        if node.meta["op"] == "DequantizeLinear":
            return node


def _after_clips(node: Node, known: set[Any]) -> Node:
    while len(node.users) == 1:
        (user,) = node.users
        if user.meta.get("op") not in CLIPS or user.meta.get("value") in known:
            break
        node = user
    return node


@final
class _Recorder(Watcher):
    """Keeps what the named nodes compute."""

    def __init__(self, graph: GraphModule, names: Sequence[str]) -> None:
        super().__init__(graph)
        self.found: dict[str, Tensor] = {}
        self._names = frozenset(names)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names and isinstance(result, Tensor):
            self.found[n.name] = result
        return result


@torch.no_grad()
def _record(twin: TwinClassifier, images: Tensor, nodes: Sequence[Node]) -> dict[str, Tensor]:
    """What ``nodes`` compute for ``images`` (n, ...), by their names, those only that have a row for each image."""
    names = [node.name for node in nodes]
    size = twin.batch or len(images)
    parts: list[dict[str, Tensor]] = []
    for chunk in torch.split(twin.normalisation(images), size):
        padding = chunk[-1:].expand(size - len(chunk), *chunk.shape[1:])
        recorder = _Recorder(twin.graph, names)
        recorder.run(torch.cat([chunk, padding]))
        parts.append({k: v[: len(chunk)] for k, v in recorder.found.items() if v.ndim and len(v) == size})
    common = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts]) for name in common}
