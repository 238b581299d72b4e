"""Questions about a node of the twin that several passes ask."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor
from torch.fx import GraphModule, Node


def op_of(node: Node) -> str:
    """The ONNX operator that the node computes, or an empty string."""
    return str(node.meta.get("op", ""))


def is_layer(node: Node) -> bool:
    """Whether the node applies a weight that can be quantized."""
    return "layer" in node.meta


def weight_source(node: Node) -> Node:
    """The node that a weighted call's weight comes from (a `get_attr` or a quantizer), looking through transposes."""
    return _origin(node.args[1])


def bias_source(node: Node) -> Node | None:
    """The `get_attr` of a weighted call's bias, or None."""
    return _origin(node.args[2]) if len(node.args) > 2 and isinstance(node.args[2], Node) else None


def constant_of(graph: GraphModule, node: Node) -> Tensor:
    """The tensor that a `get_attr` node holds."""
    tensor: Tensor = attrgetter(str(node.target))(graph)
    return tensor


def data_inputs(node: Node) -> list[Node]:
    """The nodes that carry activations into ``node``: its tensor arguments without parameters."""
    return [source for source in node.all_input_nodes if _carries_activations(source)]


def _origin(argument: object) -> Node:
    assert isinstance(argument, Node)
    while argument.op == "call_function" and argument.args and isinstance(argument.args[0], Node):
        argument = argument.args[0]
    return argument


def _carries_activations(node: Node) -> bool:
    if node.op == "placeholder":
        return True
    return node.op in ("call_function", "call_module") and any(_carries_activations(n) for n in node.all_input_nodes)
