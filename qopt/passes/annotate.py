"""Mark the activation tensors that an integer kernel reads or writes: the ones a plan may give a format.

A convolution reads and writes codes, so its input is marked and its output, after the ReLU or Clip that ONNX Runtime
absorbs into it. A matrix product reads codes and may write float, so its input is marked. Additions, concatenations
and average pools join where all they read is marked; a view (max pool, reshape, slice, zero padding, ...) carries the
codes of its source and shares its range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

from torch.fx import GraphModule, Node

from qopt.passes.base import Result
from qopt.passes.nodes import activation_nodes, is_convolution, is_layer, op_of

ABSORBED = frozenset({"Relu", "Clip"})
VIEWS = frozenset(
    {"MaxPool", "GlobalMaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad"}
    | {"Identity", "Dropout"}
)
JOINS = frozenset({"Add", "Concat", "AveragePool", "GlobalAveragePool"})


@final
@dataclass(frozen=True)
class Annotate:
    """Set ``meta["quantize"]`` of every marked node to the name of the ONNX value whose range it uses."""

    name: ClassVar[str] = "annotate"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, graph: GraphModule) -> Result:
        """Mark the graph anew; nothing is computed differently."""
        roots = _Marks(graph).roots
        for node in graph.graph.nodes:
            node.meta.pop("quantize", None)
            if node in roots and "value" in node.meta:  # the tuple that a Split returns is no value
                node.meta["quantize"] = roots[node].meta["value"]
        count = len(set(roots.values()))
        return Result(graph, False, (f"{count} activation tensors can be quantized",))


def quantizable(graph: GraphModule) -> dict[str, list[str]]:
    """Name of every ONNX value that has a range of its own, to the values that carry its codes (itself first)."""
    tensors: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        if "quantize" in node.meta and node.meta["quantize"] == node.meta["value"]:
            tensors[node.meta["value"]] = [node.meta["value"]]
    for node in graph.graph.nodes:
        if "quantize" in node.meta and node.meta["quantize"] != node.meta["value"]:
            tensors[node.meta["quantize"]].append(node.meta["value"])
    return tensors


@final
class _Marks:
    """The marked nodes, each with the node whose range it uses."""

    def __init__(self, graph: GraphModule) -> None:
        self._activations = activation_nodes(graph)
        (output,) = (n for n in graph.graph.nodes if n.op == "output")
        self._outputs = set(output.all_input_nodes)
        self.roots = {root: root for node in graph.graph.nodes for root in self._required(node)}
        for node in graph.graph.nodes:
            self._propagate(node)

    def _required(self, node: Node) -> Iterator[Node]:
        if not is_layer(node):
            return
        root = node.args[0]
        assert isinstance(root, Node)
        while (source := self._viewed(root)) is not None:
            root = source
        yield root
        if is_convolution(node):
            yield _absorbing(node)

    def _viewed(self, node: Node) -> Node | None:
        """What a view looks at, None for a node that is none."""
        if op_of(node) not in VIEWS or (op_of(node) == "Pad" and node.args[-2:] != ("constant", 0)):
            return None
        source = node.args[0]
        return source if isinstance(source, Node) and source in self._activations else None

    def _propagate(self, node: Node) -> None:
        if node in self.roots or node in self._outputs:
            return
        source = self._viewed(node)
        if source is not None and source in self.roots:
            self.roots[node] = self.roots[source]
        elif self._joins(node):
            target = _absorbing(node)
            if target not in self._outputs:
                self.roots[target] = target

    def _joins(self, node: Node) -> bool:
        return op_of(node) in JOINS and all(source in self.roots for source in node.all_input_nodes)


def _absorbing(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and op_of(users[0]) in ABSORBED else node
