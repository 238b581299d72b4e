"""Compute what depends on no image once: dequantized weights and transposes become constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.base import EXACT, Result
from qopt.passes.insert_weight_quantizers import WeightQuantizer
from qopt.passes.nodes import constant_of


@final
@dataclass(frozen=True)
class FoldWeights:
    """Replace every `WeightQuantizer` call and every transpose of a constant by a buffer, for attacks and training."""

    name: ClassVar[str] = "fold-weights"
    tolerance: ClassVar[float] = EXACT

    def __call__(self, graph: GraphModule) -> Result:
        """Fold in graph order, so that a transpose of a dequantized weight folds too."""
        folded = 0
        for node in list(graph.graph.nodes):
            value = _constant(graph, node)
            if value is None:
                continue
            name = f"{node.name}_folded"
            graph.register_buffer(name, value.detach().contiguous())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
            constant.meta.update(node.meta)
            node.replace_all_uses_with(constant)
            graph.graph.erase_node(node)
            folded += 1
        if folded:
            graph.graph.eliminate_dead_code()
            graph.delete_all_unused_submodules()
            graph.recompile()
        return Result(graph, folded > 0, (f"{folded} constants folded",) if folded else ())


def _constant(graph: GraphModule, node: Node) -> Tensor | None:
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return module() if isinstance(module, WeightQuantizer) else None
    if node.op == "call_function" and node.target is torch.t:
        source = node.args[0]
        if isinstance(source, Node) and source.op == "get_attr":
            return constant_of(graph, source).t()
    return None
