"""Every node and every value gets a name of its own: ONNX Runtime refuses repeated node names, and plans use names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir


def name_everything(model: ir.Model) -> int:
    """Name what has no name and rename what repeats one; inputs, outputs and initializers keep theirs.

    Returns:
        The number of nodes that got a new name.
    """
    changed = _name_nodes(model.graph)
    _name_values(model.graph)
    return changed


def unique(wanted: str, taken: Callable[[str], bool]) -> str:
    """``wanted``, or ``wanted_2``, ``wanted_3``, ... where it is taken."""
    name, number = wanted, 1
    while taken(name):
        number += 1
        name = f"{wanted}_{number}"
    return name


def value_names(graph: ir.Graph) -> set[str]:
    """The names of all values of the graph."""
    return {value.name for value in values(graph) if value.name}


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values of the graph: inputs, initializers that are no inputs, then node outputs in graph order."""
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        yield from node.outputs


def _name_nodes(graph: ir.Graph) -> int:
    originals = {node.name for node in graph if node.name}
    given: set[str] = set()
    changed = 0
    for index, node in enumerate(graph):
        if node.name and node.name not in given:
            given.add(node.name)
            continue
        wanted = node.name or f"{node.op_type}_{index}"
        node.name = unique(wanted, lambda name: name in given or name in originals)
        given.add(node.name)
        changed += 1
    return changed


def _name_values(graph: ir.Graph) -> None:
    fixed = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    given = {value.name for value in fixed if value.name}
    originals = value_names(graph)
    keep = set(fixed)
    for node in graph:
        for output in node.outputs:
            if output in keep or not (output.name or output.uses()):
                continue  # an output without a name or a use is an optional one that was not asked for
            if not output.name or output.name in given:
                wanted = output.name or f"{node.name}_output"
                output.name = unique(wanted, lambda name: name in given or name in originals)
            given.add(output.name)
