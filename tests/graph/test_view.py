from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import onnx_ir as ir

from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.graph.view import network_view


def test_a_chain(small_cnn: Callable[..., ir.Model]) -> None:
    prepared = prepare(small_cnn())
    view = network_view(build_twin(prepared))
    assert nx.is_directed_acyclic_graph(view)
    path = nx.shortest_path(view, "x", "output")
    assert [view.nodes[node]["op"] for node in path] == ["input", "conv2d", "relu", "flatten", "linear", "output"]
    assert [view.nodes[node]["layer"] for node in path] == [None, "conv.weight", None, None, "fc.weight", None]
    assert view.nodes["conv_weight"] == {"op": "constant", "layer": None, "value": "conv.weight"}
    assert view.nodes["output"]["value"] is None
    assert set(view.predecessors(path[1])) == {"x", "conv_weight", "conv_bias"}


def test_branches_join(graph: Any) -> None:
    g = graph()
    weight = g.random(3, 3, 1, 1, name="w")
    joined = g.op("Add", g.op("Conv", "x", weight), "x")
    view = network_view(build_twin(prepare(g.model(g.op("Flatten", joined)))))
    (add,) = [node for node, data in view.nodes.items() if data["value"] == joined]
    assert view.nodes[add]["op"] == "add"
    assert len(list(nx.all_simple_paths(view, "x", add))) == 2
    assert nx.dag_longest_path_length(view) == 4
