"""Running a network node by node: several batches side by side, and what the values of its nodes take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from qopt.graph.model import Prepared
from qopt.passes.nodes import activation_nodes, is_layer
from qopt.passes.watcher import SideBySide, Watcher, live_bytes, taped_bytes
from qopt.quantize import Quantizer

Images = Callable[..., Tensor]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]


class TestSideBySide:
    """Running several batches node by node."""

    @pytest.mark.parametrize("name", NAMES)
    def test_it_computes_what_the_graph_computes(
        self, name: str, networks: dict[str, Prepared], images: Images
    ) -> None:
        prepared = networks[name]
        twin = Quantizer(prepared).float_graph
        batches = torch.split(images(prepared, 6), 2)
        found: dict[str, list[Tensor]] = {}

        class Outputs(SideBySide):
            def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
                found[node.name] = outputs
                return outputs

        with torch.no_grad():
            runner = Outputs(twin, batches)
            runner.run_all()
            last = next(n for n in reversed(twin.graph.nodes) if n.op == "output")
            assert all(set(e) == {last} for e in runner.environments), "nothing is held that nothing reads"
            for i, batch in enumerate(batches):
                assert torch.equal(runner.environments[i][last], twin(batch))
        assert len(found) == len([n for n in twin.graph.nodes if is_layer(n)])

    def test_live_bytes(self, networks: dict[str, Prepared], images: Images) -> None:
        """c1 and r1, 4x8x8 each, are the most that is alive; weights do not count."""
        prepared = networks["plain"]
        twin = Quantizer(prepared).float_graph
        for count in (1, 10):
            part = images(prepared, 1000)[:count]
            assert live_bytes(twin, part) == count * 4 * 2 * (4 * 8 * 8)

    def test_taped_bytes_are_those_of_every_node_that_depends_on_the_image(
        self, networks: dict[str, Prepared], images: Images
    ) -> None:
        prepared = networks["plain"]
        twin = Quantizer(prepared).float_graph
        part, sizes = images(prepared, 3), list[int]()

        class Sizes(Watcher):
            def run_node(self, n: Node) -> object:
                result = super().run_node(n)
                if n in active and isinstance(result, Tensor):
                    sizes.append(4 * result.numel())
                return result

        active = activation_nodes(twin)
        with torch.no_grad():
            Sizes(twin).run(part)
        assert taped_bytes(twin, part) == sum(sizes) > live_bytes(twin, part)
