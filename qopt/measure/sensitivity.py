"""Predictions under many versions of each weight or activation, without computing again what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.attacks.score import check_images, check_logits
from qopt.measure.network import TwinClassifier
from qopt.passes.nodes import activation_nodes, is_layer, weight_source
from qopt.passes.watcher import Watcher, live_bytes

BATCH = 64
"""Images per run where the batch axis is dynamic: activations that stay in the caches run 1.6 times as fast as 250."""

ACTIVATION_BYTES = 1 << 29
"""The activations that are held at once; fewer images side by side where more."""

Environment = dict[Node, Any]


class Measured(NamedTuple):
    """Logits (images, classes) of the images from ``start`` on, under version ``version`` of what ``name`` is: the
    weight of a layer, or a tensor of activations."""

    name: str
    version: int
    start: int
    logits: Tensor


@torch.no_grad()
def version_logits(
    model: TwinClassifier, images: Tensor, versions: Callable[[str], Iterable[Tensor]]
) -> Iterator[Measured]:
    """What ``model`` says of ``images`` with the weight of one layer replaced at all its uses, the others as they are.

    The network runs once; from the first node that a layer's weight reaches, each version runs the rest. Many images
    are taken in several goes, each of which asks for all versions and measures all of them. At the same batch size the
    logits are, bit for bit, those of running the whole network under each version.

    Args:
        model: its graph stays as it is.
        images: float32 (n, ...) in [0, 1].
        versions: from a layer's name to versions of its weight, like the stored one; asked at the layer's turn.

    Raises:
        DataError, ModelError: as `qopt.attacks.predict`.
    """
    walk = _Walk(model.graph)
    for go in _goes(model, images, walk):
        for place, node in enumerate(walk.nodes):
            for turn in walk.turns.get(place, ()):
                for number, values in enumerate(versions(turn.layer)):
                    changed = walk.changed(turn, values)
                    rows = [walk.finish({**environment, **changed}, place) for environment in go.environments]
                    yield Measured(turn.layer, number, go.start, go.logits(rows))
            for environment in go.environments:
                walk.step(environment, node)


@torch.no_grad()
def tensor_logits(
    model: TwinClassifier, images: Tensor, versions: Mapping[str, Sequence[Callable[[Tensor], Tensor]]]
) -> Iterator[Measured]:
    """What ``model`` says of ``images`` with one tensor of activations replaced for all that read it.

    As `version_logits`: each version of a tensor runs only what comes after it.

    Args:
        model: its graph stays as it is.
        images: float32 (n, ...) in [0, 1].
        versions: from a tensor's name, a key of `qopt.passes.annotate.quantizable`, to functions of its values.

    Raises:
        DataError, ModelError: as `qopt.attacks.predict`.
    """
    walk = _Walk(model.graph)
    for go in _goes(model, images, walk):
        for place, node in enumerate(walk.nodes):
            for environment in go.environments:
                walk.step(environment, node)
            name = node.meta.get("value", "")
            for number, change in enumerate(versions.get(name, ()) if node.meta.get("quantize") == name else ()):
                rows = [walk.finish({**env, node: change(env[node])}, place + 1) for env in go.environments]
                yield Measured(name, number, go.start, go.logits(rows))


@final
@dataclass(frozen=True, eq=False)
class _Go:
    """Images that are taken together.

    Attributes:
        start: place of the first; ``count``: how many.
        environments: of every run of them, what is known so far.
    """

    start: int
    count: int
    environments: list[Environment]

    def logits(self, rows: Sequence[Tensor]) -> Tensor:
        """Those of all runs; only the last is ever filled up."""
        return check_logits(torch.cat(list(rows))[: self.count], self.count, self.start)


def _goes(model: TwinClassifier, images: Tensor, walk: _Walk) -> Iterator[_Go]:
    check_images(images)
    batch, together = _sizes(model, images)
    for start in range(0, len(images), together):
        part = images[start : start + together]
        chunks = torch.split(model.normalisation(part), batch)
        yield _Go(start, len(part), [walk.environment(_filled(chunk, model.batch)) for chunk in chunks])


@final
@dataclass(frozen=True, eq=False)
class _Turn:
    """Where a layer's weight comes from.

    Attributes:
        layer: its name.
        sources: the `get_attr` nodes of the weight.
        derived: further constants computed from it, in order.
    """

    layer: str
    sources: tuple[Node, ...]
    derived: tuple[Node, ...]


@final
class _Walk(Watcher):
    """Runs a graph from any node on; constants are computed once.

    Attributes:
        nodes: those that depend on the image, in order; the first is the image, the last the output.
        turns: place in ``nodes`` of the first that depends on a layer's weight, to those layers.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        active = activation_nodes(graph) | {node for node in graph.graph.nodes if node.op == "output"}
        self.nodes = [node for node in graph.graph.nodes if node in active]
        self._fixed = [node for node in graph.graph.nodes if node not in active]
        self._constants = self._computed({}, self._fixed)
        self.turns: dict[int, list[_Turn]] = {}
        sources = {node.meta["layer"]: weight_source(node) for node in graph.graph.nodes if is_layer(node)}
        for layer, source in sources.items():
            self._enter(layer, source)

    def _enter(self, layer: str, source: Node) -> None:
        sources = [node for node in self._fixed if node.op == "get_attr" and node.target == source.target]
        reached = set(sources)
        for node in self.graph.nodes:
            if any(argument in reached for argument in node.all_input_nodes):
                reached.add(node)
        last = len(self.nodes) - 1
        place = next((place for place, node in enumerate(self.nodes) if node in reached), last)
        derived = [node for node in self._fixed if node in reached and node not in sources]
        self.turns.setdefault(place, []).append(_Turn(layer, tuple(sources), tuple(derived)))

    def environment(self, batch: Tensor) -> Environment:
        """What the first node after the image reads."""
        return {**self._constants, self.nodes[0]: batch}

    def changed(self, turn: _Turn, values: Tensor) -> Environment:
        """The constants that differ where the layer's weight has ``values``."""
        weight = torch.empty_like(self._constants[turn.sources[0]]).copy_(values)
        weights: Environment = dict.fromkeys(turn.sources, weight)
        derived = self._computed({**self._constants, **weights}, turn.derived)
        return {**weights, **{node: derived[node] for node in turn.derived}}

    def step(self, environment: Environment, node: Node) -> None:
        """Run one node, and forget what no later one reads."""
        if node.op == "placeholder":
            return
        self.env = environment
        environment[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, []):
            del environment[done]

    def finish(self, environment: Environment, place: int) -> Tensor:
        """Run the nodes from ``place`` on; returns the logits."""
        for node in self.nodes[place:]:
            self.step(environment, node)
        logits: Tensor = environment[self.nodes[-1]]
        return logits

    def _computed(self, environment: Environment, nodes: Iterable[Node]) -> Environment:
        self.env = environment
        for node in nodes:
            environment[node] = self.run_node(node)
        return environment


def _sizes(model: TwinClassifier, images: Tensor) -> tuple[int, int]:
    """Images per run, and how many, in whole runs, are side by side; one more run holds the rest of the network."""
    few = _filled(model.normalisation(images[: model.batch or 1]), model.batch)
    fit = ACTIVATION_BYTES * len(few) // max(live_bytes(model.graph, few), 1)
    batch = model.batch or max(min(BATCH, fit // 2), 1)
    return batch, max(fit // batch - 1, 1) * batch


def _filled(chunk: Tensor, batch: int | None) -> Tensor:
    """``chunk`` (n, ...), its last image repeated up to ``batch``."""
    missing = (batch or 0) - len(chunk)
    return torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing > 0 else chunk
