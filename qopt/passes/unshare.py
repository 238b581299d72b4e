"""Give every use of a weight or bias its own `get_attr` node, so that changing one use never changes another unseen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch.fx import GraphModule

from qopt.passes.base import Result
from qopt.passes.nodes import is_layer


@final
@dataclass(frozen=True)
class Unshare:
    """Split shared `get_attr` nodes of weighted calls; the tensors stay shared, only the nodes are split."""

    name: ClassVar[str] = "unshare"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, graph: GraphModule) -> Result:
        """One copy per user beyond the first."""
        split = 0
        for node in list(graph.graph.nodes):
            if node.op != "get_attr" or len(node.users) < 2 or not any(map(is_layer, node.users)):
                continue
            for user in list(node.users)[1:]:
                with graph.graph.inserting_before(node.next):
                    copy = graph.graph.node_copy(node)
                user.replace_input_with(node, copy)
                split += 1
        if split:
            graph.recompile()
        return Result(graph, split > 0, (f"{split} shared parameters given a node for each use",) if split else ())
