"""Run a twin node by node, to look at what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qopt.passes.nodes import activation_nodes, is_layer


class Watcher(Interpreter):
    """Base of interpreters that observe; an error raised while they run keeps its one-line message."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # it would write torch's trace into the arguments of our own errors

    @final
    def watch(self, images: Tensor, batch_size: int) -> None:
        """Run ``images`` (n, ...) through the graph, ``batch_size`` at a time."""
        for start in range(0, len(images), batch_size):
            self.run(images[start : start + batch_size])


class SideBySide(Watcher):
    """Runs several batches node by node, so that a layer's inputs and outputs on all of them are known at once.

    Attributes:
        environments: for each batch, the values that later nodes read.
    """

    def __init__(self, graph: GraphModule, batches: tuple[Tensor, ...]) -> None:
        super().__init__(graph)
        self.environments: list[dict[Node, Any]] = [{} for _ in batches]
        self._batches = batches

    @final
    def run_all(self) -> None:
        """Run every node."""
        for node in self.graph.nodes:
            self.step(node)

    @final
    def step(self, node: Node) -> None:
        """Run one node; the nodes before it have been run."""
        if is_layer(node):
            self.before(node)
        results = []
        for environment, batch in zip(self.environments, self._batches, strict=True):
            self.env, self.args_iter = environment, iter((batch,))
            results.append(self.run_node(node))
        if is_layer(node):
            results = self.layer(node, results)
        for environment, result in zip(self.environments, results, strict=True):
            environment[node] = result
            for done in self.user_to_last_uses.get(node, []):
                del environment[done]

    @final
    def arguments(self, node: Node, environment: dict[Node, Any]) -> tuple[Any, ...]:
        """The values of the arguments of a node that is about to run."""
        self.env = environment
        args, _ = self.fetch_args_kwargs_from_env(node)
        return args

    @final
    def refresh(self, chain: Sequence[Node]) -> None:
        """Compute nodes that follow one another and do not depend on the image anew; the last is read later."""
        self.env = {}
        for step in chain:
            self.env[step] = self.run_node(step)
        for environment in self.environments:
            environment[chain[-1]] = self.env[chain[-1]]

    def before(self, node: Node) -> None:
        """Called when a layer is about to run."""

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        """Called with a layer's outputs on all batches; returns what the nodes after it see."""
        return outputs


@torch.no_grad()
def live_bytes(graph: GraphModule, batch: Tensor) -> int:
    """The most bytes of activations of ``batch`` that `SideBySide` holds at a time; views share what they look at."""
    activations, batch = activation_nodes(graph), batch.clone()  # not the storage of all images it may be a part of
    runner, held, largest = SideBySide(graph, (batch,)), [batch], 0
    for node in runner.graph.nodes:
        runner.step(node)
        alive = [v for n, v in runner.environments[0].items() if n in activations and isinstance(v, Tensor)]
        storages = [tensor.untyped_storage() for tensor in held + alive]  # a node's arguments live until it has run
        largest = max(largest, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        held = alive
    return largest


@torch.no_grad()
def taped_bytes(graph: GraphModule, batch: Tensor) -> int:
    """Bytes of all activations of ``batch``, views included: about what is held while a gradient is to pass them."""
    activations, runner, total = activation_nodes(graph), SideBySide(graph, (batch,)), 0
    for node in runner.graph.nodes:
        runner.step(node)
        value = runner.environments[0].get(node)
        if node in activations and isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total
