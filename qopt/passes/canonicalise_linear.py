"""Write a matrix product with a constant right side, and the bias that follows it, as one `linear` call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument
from torch.nn import functional

from qopt.passes.base import EXACT, Result
from qopt.passes.nodes import constant_of, is_layer, weight_source


@final
@dataclass(frozen=True)
class CanonicaliseLinear:
    """``matmul(x, W)`` of a layer, with or without ``+ b``, becomes ``linear(x, W.t(), b)``.

    The weight's `get_attr` keeps its stored orientation; later passes find the bias of every layer, matrix products
    included, as its third argument. What counts as the bias is what `Use.bias` names: a vector of one value per output
    channel, added by the only node that reads the product.
    """

    name: ClassVar[str] = "canonicalise-linear"
    tolerance: ClassVar[float] = EXACT

    def __call__(self, graph: GraphModule) -> Result:
        """Rewrite all of them."""
        products = [n for n in graph.graph.nodes if n.target is torch.matmul and is_layer(n)]
        for node in products:
            _rewrite(graph, node)
        if products:
            graph.graph.eliminate_dead_code()
            graph.recompile()
        return Result(
            graph, bool(products), (f"{len(products)} matrix products written as linear",) if products else ()
        )


def _rewrite(graph: GraphModule, node: Node) -> None:
    bias_add = _bias_add(graph, node)
    last = bias_add or node
    x, weight = node.args[0], node.args[1]
    with graph.graph.inserting_before(last):
        transposed = graph.graph.call_function(torch.t, (weight,))
        bias = _other(bias_add, node) if bias_add is not None else None
        linear = graph.graph.call_function(functional.linear, (x, transposed, bias))
    linear.meta.update(last.meta)
    linear.meta.update({key: node.meta[key] for key in ("layer", "use")})
    last.replace_all_uses_with(linear)
    if bias_add is not None:
        graph.graph.erase_node(bias_add)
    graph.graph.erase_node(node)


def _bias_add(graph: GraphModule, node: Node) -> Node | None:
    """The addition of a constant vector that is the product's only user, or None."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if user.target is not torch.add or len(user.args) != 2:
        return None
    other = _other(user, node)
    if not isinstance(other, Node) or other.op != "get_attr":
        return None
    weight = constant_of(graph, weight_source(node))
    return user if constant_of(graph, other).shape == weight.shape[1:] else None


def _other(add: Node, node: Node) -> Argument:
    return add.args[1] if add.args[0] is node else add.args[0]
