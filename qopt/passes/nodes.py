"""Questions about a node of the twin that several passes ask."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.graph.names import unique


def op_of(node: Node) -> str:
    """The ONNX operator that the node computes, or an empty string."""
    return str(node.meta.get("op", ""))


def is_layer(node: Node) -> bool:
    """Whether the node applies a weight that can be quantized."""
    return "layer" in node.meta


def is_convolution(node: Node) -> bool:
    """Whether output channels are axis 1; in matrix products they are the last axis."""
    return op_of(node) in ("Conv", "ConvTranspose")


def weight_source(node: Node) -> Node:
    """The node that a weighted call's weight comes from (a `get_attr` or a quantizer), looking through transposes."""
    return _origin(node.args[1])


def weight_chain(node: Node) -> list[Node]:
    """From what a weighted call's weight comes from, through transposes, to the call's argument."""
    chain, source = [node.args[1]], weight_source(node)
    while isinstance(chain[-1], Node) and chain[-1] is not source:
        chain.append(chain[-1].args[0])
    return [step for step in reversed(chain) if isinstance(step, Node)]


def bias_source(node: Node) -> Node | None:
    """The `get_attr` of a weighted call's bias, or None."""
    return _origin(node.args[2]) if len(node.args) > 2 and isinstance(node.args[2], Node) else None


def constant_of(graph: GraphModule, node: Node) -> Tensor:
    """The tensor that a `get_attr` node holds."""
    tensor: Tensor = attrgetter(str(node.target))(graph)
    return tensor


def activation_nodes(graph: GraphModule) -> set[Node]:
    """The nodes whose value depends on the image."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def free_name(graph: GraphModule, wanted: str) -> str:
    """``wanted``, numbered where the module already has an attribute of that name."""
    return unique(wanted, lambda name: hasattr(graph, name))


def set_bias(graph: GraphModule, node: Node, bias: Tensor) -> None:
    """Give a weighted call the bias (channels,), in place of the one it has, if any; other calls keep theirs."""
    name = free_name(graph, f"{node.name}_new_bias")
    graph.register_buffer(name, bias)
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(name)
    node.update_arg(2, constant)


def _origin(argument: object) -> Node:
    assert isinstance(argument, Node)
    while argument.op == "call_function" and argument.args and isinstance(argument.args[0], Node):
        argument = argument.args[0]
    return argument
