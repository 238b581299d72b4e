"""New constants and nodes in the user's graph, under names that nothing in it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.errors import VerificationError
from qopt.graph.names import unique, value_names
from qopt.runtime.patterns import Subgraph
from qopt.runtime.values import constant


@final
class Additions:
    """What qopt adds to one graph. A name that is taken gets ``_2``, ``_3``, ... appended.

    Args:
        graph: the graph that grows.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken = value_names(graph) | {str(node.name) for node in graph}
        self._shared: dict[str, ir.Value] = {}
        self._numbers = 0

    def name(self, wanted: str) -> str:
        """``wanted``, or the next free name; it counts as taken from now on."""
        free = unique(wanted, self._taken.__contains__)
        self._taken.add(free)
        return free

    def _numbered(self) -> str:
        self._numbers += 1
        return self.name(f"q{self._numbers}")

    def constant(self, wanted: str, array: NDArray[Any]) -> ir.Value:
        """A new initializer."""
        value = constant(self.name(wanted), array)
        self.graph.initializers[str(value.name)] = value
        return value

    def shared(self, wanted: str, array: NDArray[Any]) -> ir.Value:
        """The initializer that all who ask for ``wanted`` share.

        Raises:
            VerificationError: ``array`` is not what the first one asked for.
        """
        if wanted not in self._shared:
            self._shared[wanted] = self.constant(wanted, array)
        value = self._shared[wanted]
        assert value.const_value is not None
        if not np.array_equal(value.const_value.numpy(), array):
            raise VerificationError("weights of one format have different tables", where=wanted)
        return value

    def node(self, op: str, inputs: Sequence[ir.Value | None], wanted: str, **attributes: Any) -> ir.Node:
        """A named node with one output, to be placed by the caller."""
        node = ir.node(op, list(inputs), attributes=attributes, name=self.name(wanted))
        node.outputs[0].name = node.name
        return node

    def place(self, packed: Subgraph, before: ir.Node) -> None:
        """Put a packed weight in front of the node that reads it first.

        Only constants and the last node get a name that says whose they are, and values between a number: names of
        steps on the way would be a fifth of the structure of a small file.
        """
        for name, value in packed.tables.items():
            assert value.const_value is not None
            value.replace_all_uses_with(self.shared(name, np.asarray(value.const_value.numpy())))
        for name, value in packed.initializers.items():
            value.name = self.name(name)
            self.graph.initializers[value.name] = value
        *inner, last = packed.nodes
        for node in inner:
            node.name, node.outputs[0].name = "", self._numbered()
        last.name = last.outputs[0].name = self.name(str(last.name))
        self.graph.insert_before(before, packed.nodes)
