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
from qopt.passes.nodes import data_inputs, is_layer, op_of

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
        """Mark the graph; nothing is computed differently."""
        outputs = _logits(graph)
        required = [root for node in graph.graph.nodes for root in _required(node)]
        marked = {root: root for root in required if root not in outputs}
        for node in graph.graph.nodes:
            _propagate(node, marked, outputs)
        for node, source in marked.items():
            node.meta["quantize"] = source.meta["value"]
        count = len(set(marked.values()))
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


def _required(node: Node) -> Iterator[Node]:
    if not is_layer(node):
        return
    yield _root(data_inputs(node)[0])
    if op_of(node) in ("Conv", "ConvTranspose"):
        yield _absorbing(node)


def _root(node: Node) -> Node:
    while _is_view(node):
        node = data_inputs(node)[0]
    return node


def _is_view(node: Node) -> bool:
    if op_of(node) not in VIEWS or "value" not in node.meta or not data_inputs(node):
        return False
    return op_of(node) != "Pad" or node.args[-2:] == ("constant", 0)


def _absorbing(node: Node) -> Node:
    users = list(node.users)
    if len(users) == 1 and op_of(users[0]) in ABSORBED and "value" in users[0].meta:
        return users[0]
    return node


def _propagate(node: Node, marked: dict[Node, Node], outputs: set[Node]) -> None:
    if node in marked or node in outputs:
        return
    sources = data_inputs(node)
    if not sources or any(source not in marked for source in sources):
        return
    if _is_view(node):
        marked[node] = marked[sources[0]]
    elif op_of(node) in JOINS and not is_layer(node) and len(sources) == len(_operands(node)):
        target = _absorbing(node)
        if target not in outputs:
            marked[target] = target


def _operands(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.op != "get_attr" or "Pool" not in op_of(node)]


def _logits(graph: GraphModule) -> set[Node]:
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    return set(output.all_input_nodes)
