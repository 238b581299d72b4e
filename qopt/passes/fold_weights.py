"""Compute what depends on no image once: dequantized weights and transposes become constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.base import EXACT, Result
from qopt.passes.insert_weight_quantizers import WeightQuantizer
from qopt.passes.nodes import constant_of, free_name


@final
@dataclass(frozen=True)
class FoldWeights:
    """Replace every `WeightQuantizer` call and every transpose of a constant by a buffer, for attacks and training.

    Buffers that nothing reads any more, such as the float weights, leave the graph.
    """

    name: ClassVar[str] = "fold-weights"
    tolerance: ClassVar[float] = EXACT

    def __call__(self, graph: GraphModule) -> Result:
        """Fold in graph order, so that a transpose of a dequantized weight folds too; equal calls share a buffer."""
        buffers: dict[tuple[object, ...], str] = {}
        for node in list(graph.graph.nodes):
            key = _key(graph, node)
            if key is None:
                continue
            if key not in buffers:
                buffers[key] = free_name(graph, f"{node.name}_folded")
                graph.register_buffer(buffers[key], _value(graph, node).detach().contiguous())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(buffers[key])
            constant.meta.update(node.meta)
            node.replace_all_uses_with(constant)
            graph.graph.erase_node(node)
        if buffers:
            graph.graph.eliminate_dead_code()
            graph.delete_all_unused_submodules()
            _delete_unused_buffers(graph)
            graph.recompile()
        return Result(graph, bool(buffers), (f"{len(buffers)} constants folded",) if buffers else ())


def _key(graph: GraphModule, node: Node) -> tuple[object, ...] | None:
    """Equal for calls that compute the same constant; None for every other node."""
    if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), WeightQuantizer):
        return (node.target,)
    if node.target is torch.t and isinstance(source := node.args[0], Node) and source.op == "get_attr":
        return (torch.t, source.target)
    return None


def _value(graph: GraphModule, node: Node) -> Tensor:
    if node.op == "call_module":
        weight: Tensor = graph.get_submodule(str(node.target))()
        return weight
    (source,) = node.all_input_nodes
    return constant_of(graph, source).t()


def _delete_unused_buffers(graph: GraphModule) -> None:
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in list(graph.named_buffers(recurse=False)):
        if name not in used:
            delattr(graph, name)
