"""The twin as a networkx graph, for questions about paths, branches and liveness."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch


def network_view(twin: torch.fx.GraphModule) -> nx.DiGraph[str]:
    """The data flow of ``twin``: a node per FX node, by name, and an edge from each to its readers.

    Node attributes: ``op``, the name of the function called, or ``input``, ``constant`` and ``output``; ``layer``, the
    layer's name where a layer is applied, else None; ``value``, the ONNX value's name, None where the node has none.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in twin.graph.nodes:
        graph.add_node(node.name, op=_op(node), layer=node.meta.get("layer"), value=node.meta.get("value"))
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def _op(node: torch.fx.Node) -> str:
    if node.op == "call_function":
        function: Any = node.target
        return str(function.__name__)
    return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)
