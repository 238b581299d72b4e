"""The pipeline catches passes that lie, break or change what they must not: every one of these is planted."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from qopt.errors import ModelError, VerificationError
from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.base import EXACT, Pipeline, Result, relative_change


@dataclass(frozen=True)
class Planted:
    """A pass that does ``edit`` and says ``modified`` about it."""

    edit: Callable[[GraphModule], None]
    modified: bool = True

    name: ClassVar[str] = "planted"
    tolerance: ClassVar[float] = EXACT

    def __call__(self, graph: GraphModule) -> Result:
        self.edit(graph)
        return Result(graph, self.modified, ("edited",))


@dataclass(frozen=True)
class Quantizing(Planted):
    tolerance: ClassVar[float] = math.inf


@pytest.fixture
def twin(networks: dict[str, Prepared]) -> GraphModule:
    return build_twin(networks["plain"])


@pytest.fixture
def pipeline(networks: dict[str, Prepared], images: Callable[..., torch.Tensor]) -> Callable[[Planted], Pipeline]:
    return lambda planted: Pipeline((planted,), images(networks["plain"], 2))


def _named(graph: GraphModule, name: str) -> Node:
    (found,) = (node for node in graph.graph.nodes if node.name == name)
    assert isinstance(found, Node)
    return found


def _logits(graph: GraphModule) -> Node:
    (node,) = _named(graph, "output").all_input_nodes
    return node


def _insert(graph: GraphModule, function: Callable[..., Any], *args: Any) -> None:
    """``function(logits, *args)`` becomes the output."""
    logits = _logits(graph)
    with graph.graph.inserting_after(logits):
        call = graph.graph.call_function(function, (logits, *args))
    logits.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def scale_weight(factor: float) -> Callable[[GraphModule], None]:
    def scale(graph: GraphModule) -> None:
        graph.get_buffer("w3").mul_(factor)

    return scale


def reorder_channels(graph: GraphModule) -> None:
    graph.get_buffer("w2").copy_(graph.get_buffer("w2").flip(1))


def drop_relu(graph: GraphModule) -> None:
    relu = _named(graph, "r1")
    relu.replace_all_uses_with(relu.all_input_nodes[0])
    graph.graph.erase_node(relu)
    graph.recompile()


def drop_relu_and_leave_the_old_code(graph: GraphModule) -> None:
    relu = _named(graph, "r1")
    relu.replace_all_uses_with(relu.all_input_nodes[0])


def missing_attribute(graph: GraphModule) -> None:
    del graph.w1


def use_before_definition(graph: GraphModule) -> None:
    _named(graph, "r1").replace_input_with(_named(graph, "c1"), _named(graph, "r2"))


def missing_module(graph: GraphModule) -> None:
    graph.add_submodule("nowhere", nn.ReLU())
    with graph.graph.inserting_after(_logits(graph)):
        graph.graph.call_module("nowhere", (_logits(graph),))
    graph.delete_submodule("nowhere")


def wrong_arity(graph: GraphModule) -> None:
    _named(graph, "r1").args = ()


def index_out_of_range(graph: GraphModule) -> None:
    _insert(graph, torch.flip, (7,))


def bad_value(graph: GraphModule) -> None:
    _insert(graph, nn.functional.pad, (1,))


def not_a_number(graph: GraphModule) -> None:
    _insert(graph, torch.sub, math.inf)
    _insert(graph, torch.mul, 0.0)


def infinite_weight(graph: GraphModule) -> None:
    graph.get_buffer("b3")[1] = math.inf


def extra_class(graph: GraphModule) -> None:
    _insert(graph, nn.functional.pad, (0, 1))


def one_row(graph: GraphModule) -> None:
    _insert(graph, operator.getitem, slice(0, 1))


def dead_weight(graph: GraphModule) -> None:
    """A change that the logits of no image show: a channel whose consumers ignore it."""
    graph.get_buffer("w1")[0] += 1.0


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (scale_weight(1.01), "changed the outputs"),
        (scale_weight(0.0), "changed the outputs"),
        (reorder_channels, "changed the outputs"),
        (drop_relu, "changed the outputs"),
        (drop_relu_and_leave_the_old_code, "changed the outputs"),
        (missing_attribute, "does not run"),
        (use_before_definition, "does not run"),
        (missing_module, "does not run"),
        (wrong_arity, "does not run"),
        (index_out_of_range, "does not run"),
        (bad_value, "does not run"),
        (not_a_number, "non-finite"),
        (infinite_weight, "non-finite"),
        (extra_class, "shape of the logits"),
        (one_row, "shape of the logits"),
    ],
)
def test_a_broken_pass_is_caught_and_named(
    edit: Callable[[GraphModule], None], what: str, twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    with pytest.raises(VerificationError, match=f"^planted: .*{what}") as caught:
        pipeline(Planted(edit))(twin)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("edit", [not_a_number, infinite_weight, extra_class, missing_attribute])
def test_no_tolerance_excuses_a_broken_graph(
    edit: Callable[[GraphModule], None], twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    with pytest.raises(VerificationError):
        pipeline(Quantizing(edit))(twin)


@pytest.mark.parametrize("edit", [scale_weight(0.0), reorder_channels, drop_relu])
def test_infinite_tolerance_allows_any_finite_change(
    edit: Callable[[GraphModule], None], twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    assert pipeline(Quantizing(edit))(twin) is twin


@pytest.mark.parametrize("edit", [scale_weight(1 + 1e-6), drop_relu, reorder_channels, dead_weight])
def test_a_change_that_is_denied_is_caught(
    edit: Callable[[GraphModule], None], twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    twin.get_buffer("w2")[:, 0] = 0.0  # so that the first channel of w1 reaches no logit
    with pytest.raises(VerificationError, match="reported no change"):
        pipeline(_denying(edit))(twin)


def _denying(edit: Callable[[GraphModule], None]) -> Planted:
    return Quantizing(edit, modified=False)


def test_replacing_a_buffer_by_an_equal_one_is_a_change(
    twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    def replace(graph: GraphModule) -> None:
        graph.register_buffer("w1", graph.get_buffer("w1").clone())

    with pytest.raises(VerificationError, match="reported no change"):
        pipeline(_denying(replace))(twin)


def test_marks_are_no_change(twin: GraphModule, pipeline: Callable[[Planted], Pipeline]) -> None:
    def mark(graph: GraphModule) -> None:
        _named(graph, "r1").meta["quantize"] = "r1"

    assert _named(pipeline(_denying(mark))(twin), "r1").meta["quantize"] == "r1"


def test_rounding_is_within_exact(twin: GraphModule, pipeline: Callable[[Planted], Pipeline]) -> None:
    pipeline(Planted(scale_weight(1 + 1e-6)))(twin)


def test_each_pass_is_held_against_the_one_before(
    twin: GraphModule, networks: dict[str, Prepared], images: Callable[..., torch.Tensor]
) -> None:
    steps = (Quantizing(scale_weight(0.5)), Planted(scale_weight(1 + 1e-6)))
    pipeline = Pipeline(steps, images(networks["plain"], 2))
    pipeline(twin)
    assert pipeline.notes == ["edited", "edited"]
    assert set(pipeline.seconds) == {"planted"}
    assert pipeline.seconds["planted"] > 0
    with pytest.raises(VerificationError, match="expected at most"):
        Pipeline((steps[0], Planted(scale_weight(1.01))), images(networks["plain"], 2))(twin)


def test_the_code_that_runs_is_the_graph_that_is_left(
    twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    """A pass that forgets to recompile leaves no old code behind."""

    def forgetful(graph: GraphModule) -> None:
        _insert(graph, torch.add, 0.0)

    assert "torch.add" in pipeline(Planted(forgetful))(twin).code


def test_a_network_that_is_broken_to_begin_with_is_blamed_on_nobody(
    twin: GraphModule, pipeline: Callable[[Planted], Pipeline]
) -> None:
    infinite_weight(twin)
    with pytest.raises(ModelError, match="not finite"):
        pipeline(Planted(lambda graph: None, modified=False))(twin)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ([[1.0, -4.0]], [[1.0, -4.0]], 0.0),
        ([[1.0, -4.0]], [[2.0, -4.0]], 0.25),
        ([[0.1, 0.2]], [[0.1, 0.3]], 0.1),
        ([[0.0, 0.0]], [[0.0, 5.0]], 5.0),
    ],
)
def test_relative_change(before: list[list[float]], after: list[list[float]], change: float) -> None:
    assert relative_change(torch.tensor(before), torch.tensor(after)) == pytest.approx(change)
