"""Run a twin node by node, to look at what passes through it."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.fx import GraphModule, Interpreter


class Watcher(Interpreter):
    """Base of interpreters that observe; an error raised while they run keeps its one-line message."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # it would write torch's trace into the arguments of our own errors

    @final
    def watch(self, images: Tensor, batch_size: int) -> None:
        """Run ``images`` (n, ...) through the graph, ``batch_size`` at a time."""
        for start in range(0, len(images), batch_size):
            self.run(images[start : start + batch_size])
