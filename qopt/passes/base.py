"""What a pass is, and the pipeline that runs passes, verifies each and times it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.errors import ModelError, VerificationError

EXACT = 1e-4
"""Largest relative difference of the logits that float rounding explains, for a pass that must not change them."""


@final
@dataclass(frozen=True, eq=False)
class Result:
    """What a pass returns.

    Attributes:
        graph: the graph after the pass (the one it was given, edited in place).
        modified: whether anything changed; the pipeline checks that ``False`` is true.
        notes: what it did, one clause each.
    """

    graph: GraphModule
    modified: bool
    notes: tuple[str, ...] = ()


class Pass(Protocol):
    """A step on the twin. Implementations are frozen dataclasses; their fields are their options.

    Attributes:
        name: the word for it in configuration, log and plugins.
        tolerance: largest relative change of the logits that the pass may cause; infinity where any change is its
            purpose (quantization).
    """

    name: ClassVar[str]
    tolerance: ClassVar[float]

    def __call__(self, graph: GraphModule) -> Result:
        """Apply the pass."""
        ...


@final
@dataclass
class Pipeline:
    """Passes in order; after each, structure and outputs are checked (two inputs, as DESIGN 3.19 asks).

    Attributes:
        passes: the passes.
        sample: two images or more, shape (n, ...), on which outputs are compared.
        seconds: pass name to the time it took, filled by a run.
        notes: what the passes said, filled by a run.
    """

    passes: Sequence[Pass]
    sample: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, graph: GraphModule) -> GraphModule:
        """Run all passes on ``graph``.

        Raises:
            ModelError: the graph's logits are not finite before any pass has touched it.
            VerificationError: a pass left a broken graph, changed the outputs by more than its tolerance, produced
                non-finite logits, or said that it changed nothing and did.
        """
        graph.recompile()
        before = _logits(graph, self.sample)
        if not before.isfinite().all():
            raise ModelError("the logits are not finite", where="the network on random images", fix="check its weights")
        for step in self.passes:
            state = _state(graph)
            began = time.perf_counter()
            result = step(graph)
            self.seconds[step.name] = self.seconds.get(step.name, 0.0) + time.perf_counter() - began
            self.notes.extend(result.notes)
            graph = result.graph
            after = verify(graph, self.sample, before, step)
            if not result.modified and (_state(graph) != state or not torch.equal(before, after)):
                raise VerificationError("a pass that reported no change has changed the graph", where=step.name)
            before = after
        return graph


def verify(graph: GraphModule, sample: Tensor, before: Tensor, step: Pass) -> Tensor:
    """The logits of ``graph`` after ``step``, checked against the logits ``before`` it.

    The code is generated anew first, so that what is verified is the graph that later passes will see.

    Raises:
        VerificationError: as `Pipeline` says.
    """
    try:
        graph.graph.lint()
        graph.recompile()
        after = _logits(graph, sample)
    except Exception as error:  # a broken graph raises whatever the first bad operator raises
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise VerificationError("a pass left a graph that does not run", where=step.name, got=reason) from error
    if after.shape != before.shape:
        raise VerificationError(
            "a pass changed the shape of the logits", where=step.name, expected=str(tuple(before.shape)),
            got=str(tuple(after.shape)),
        )  # fmt: skip
    if not torch.isfinite(after).all():
        raise VerificationError("a pass made the logits non-finite", where=step.name)
    change = relative_change(before, after)
    if change > step.tolerance:
        raise VerificationError(
            "a pass changed the outputs more than it may", where=step.name, expected=f"at most {step.tolerance:g}",
            got=f"{change:.3g}",
        )  # fmt: skip
    return after


def relative_change(before: Tensor, after: Tensor) -> float:
    """``max |after - before| / max(1, max |before|)``: logits below 1 are compared absolutely."""
    return float((after - before).abs().max() / before.abs().max().clamp_min(1.0))


def _state(graph: GraphModule) -> tuple[str, list[tuple[str, int, int]]]:
    """What a pass that changes nothing leaves alone: the code, and which tensors it reads, in which version."""
    tensors = graph.state_dict(keep_vars=True)
    return graph.code, [(k, t.data_ptr(), 0 if t.is_inference() else t._version) for k, t in tensors.items()]


@torch.no_grad()
def _logits(graph: GraphModule, sample: Tensor) -> Tensor:
    logits: Tensor = graph(sample)
    return logits
