"""Nothing that an attack finds inside the ball lies outside the bounds, at any step of any network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qopt.certificates.backward import Backward
from qopt.certificates.ball import Ball
from qopt.certificates.interval import Box, intervals
from qopt.certificates.network import Network
from qopt.certificates.read import read
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import ThreatModel

from .conftest import NETWORKS, THREATS, Case, along, ascend, parse, scattered, values_of

IMAGES = 2


def holds(network: Network, boxes: list[Box], values: dict[str, Any]) -> None:
    """Every node's value lies in the box of its last step."""
    last = {step.name: place for place, step in enumerate(network.steps)}
    for name, place in last.items():
        value = values[name].double()
        box = boxes[place]
        assert box.low.shape == value.shape
        assert bool((box.low <= value).all()), f"{name} below its bound by {(box.low - value).max()}"
        assert bool((value <= box.high).all()), f"{name} above its bound by {(value - box.high).max()}"


def attacked(case: Case, images: Tensor, threat: ThreatModel, rows: Tensor) -> list[Tensor]:
    """Points of the balls: corners, and for every row of ``rows`` (k, classes) one that makes it small."""
    points = [*scattered(images, threat, 4), images]
    points += [ascend(along(case.twin, row, -1.0), images, threat) for row in rows]
    return points


@pytest.mark.parametrize(("fmt", "threat"), list(zip(["w8a8", "w4", "w4a3"], THREATS, strict=True)), ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_of_the_ball_leaves_a_bound(
    name: str, fmt: str, threat: ThreatModel, cases: Callable[..., Case]
) -> None:
    case = cases(name, fmt)
    images = case.images(IMAGES)
    images[0] = (images[0] > 0.5).float()  # pixels at the ends of the box
    network, ball = read(case.twin, case.shape), Ball.around(images, threat)
    eye = torch.eye(case.classes)
    rows = torch.cat([eye[:1], -eye[:1], eye[:1] - eye[1:]])
    full, cheap = Backward(network, ball), Backward(network, ball, work=0.0)
    plain = intervals(network, ball)
    lower = torch.stack([b.lower(rows.expand(IMAGES, -1, -1)) for b in (full, cheap)]).amax(0)
    for points in attacked(case, images, threat, rows):
        values = values_of(case.twin, points)
        for boxes in (plain, full.boxes, cheap.boxes):
            holds(network, boxes, values)
        logits = case.twin(points).detach().double()
        assert bool((lower <= logits @ rows.double().T).all())


@pytest.mark.parametrize("threat", THREATS[1:], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_backward_is_never_looser_than_intervals(name: str, threat: ThreatModel, cases: Callable[..., Case]) -> None:
    """On the margins, where the two share the logits' own intervals; and much tighter over all."""
    case = cases(name, "w4")
    images = case.images(IMAGES)
    network, ball = read(case.twin, case.shape), Ball.around(images, threat)
    eye = torch.eye(case.classes)
    rows = (eye[:1] - eye[1:]).expand(IMAGES, -1, -1)
    box = intervals(network, ball)[-1]
    apart = box.low[:, :1] - box.high[:, 1:]
    full = Backward(network, ball).lower(rows)
    assert bool((full >= apart - 1e-4).all())
    assert float((full - apart).mean()) > 0
    for before, after in zip(intervals(network, ball), Backward(network, ball).boxes, strict=True):
        assert bool((after.low >= before.low - 1e-9).all())
        assert bool((after.high <= before.high + 1e-9).all())


@pytest.mark.parametrize("name", ["residual", "overlap"])
def test_chunks_change_nothing(name: str, cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by chunks of rows; results do not depend on them."""
    case, images = cases(name, "w4a3"), cases(name, "w4a3").images(4)
    network, ball = read(case.twin, case.shape), Ball.around(images, THREATS[0])
    rows = torch.eye(case.classes).expand(4, -1, -1)
    whole = Backward(network, ball).lower(rows)
    monkeypatch.setattr("qopt.certificates.backward.MEMORY", 48 * 1500)
    assert torch.allclose(Backward(network, ball).lower(rows), whole, atol=1e-5)


def test_what_costs_too_much_keeps_its_intervals(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    network, ball = read(case.twin, case.shape), Ball.around(case.images(2), THREATS[1])
    plain = intervals(network, ball)
    for before, after in zip(plain, Backward(network, ball, work=10.0).boxes, strict=True):
        assert torch.equal(before.low, after.low)
    tight = Backward(network, ball).boxes
    assert any(bool((after.low > before.low + 1e-6).any()) for before, after in zip(plain, tight, strict=True))


CODED = """(float[n,2,4,4] x, float[3,2,3,3] w1, float[3] b1, float[3,48] w2) => (float[n,3] y)
        <float s0 = {0.07}, uint8 z0 = {3}, float[3] s1 = {0.2, 0.05, 0.3}, int8[3] z1 = {-128, -20, 5}> {
    q0 = QuantizeLinear (x, s0, z0)
    d0 = DequantizeLinear (q0, s0, z0)
    c1 = Conv <pads = [1,1,1,1]> (d0, w1, b1)
    q1 = QuantizeLinear <axis = 1> (c1, s1, z1)
    d1 = DequantizeLinear <axis = 1> (q1, s1, z1)
    f = Flatten (d1)
    y = Gemm <transB = 1> (f, w2)
}"""


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_codes_that_the_file_came_with(threat: ThreatModel) -> None:
    """QuantizeLinear and DequantizeLinear, per tensor and per channel, as steps of their own."""
    prepared = prepare(parse(CODED))
    case = Case("coded", build_twin(prepared), build_twin(prepared), (2, 4, 4), 3)
    images, eye = case.images(3), torch.eye(3)
    network, ball = read(case.twin, case.shape), Ball.around(images, threat)
    full = Backward(network, ball)
    lower = full.lower(eye.expand(3, -1, -1))
    for points in attacked(case, images, threat, eye):
        values = values_of(case.twin, points)
        holds(network, intervals(network, ball), values)
        holds(network, full.boxes, values)
        assert bool((lower <= case.twin(points).detach().double()).all())
