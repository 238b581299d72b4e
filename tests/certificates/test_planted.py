"""Mistakes planted on purpose: each makes a bound wrong, and the checks of the other tests see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qopt.certificates.backward import Backward
from qopt.certificates.ball import Ball
from qopt.certificates.curves import Clamp, Lines, Staircase
from qopt.certificates.interval import intervals
from qopt.certificates.maps import Convolution, Product
from qopt.certificates.network import Network
from qopt.certificates.read import read
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import ThreatModel

from .conftest import Case, along, ascend, parse, scattered

THREAT = ThreatModel("linf", 0.05)


def violations(case: Case, seed: int = 0) -> int:
    """How many attacked logits lie outside backward or interval bounds."""
    images = case.images(2, seed)
    network, ball = read(case.twin, case.shape), Ball.around(images, THREAT)
    eye = torch.eye(case.classes)
    rows = torch.cat([eye, -eye])
    lower = Backward(network, ball).lower(rows.expand(2, -1, -1))
    box = intervals(network, ball)[-1]
    count = 0
    attacks = [ascend(along(case.twin, row, -1.0), images, THREAT, 10) for row in rows]
    for points in [*scattered(images, THREAT, 4), *attacks]:
        logits = case.twin(points).detach().double()
        count += int((lower > logits @ rows.double().T).sum())
        count += int(((logits < box.low) | (logits > box.high)).sum())
    return count


def all_violations(cases: Callable[..., Case], fmt: str) -> int:
    return sum(violations(cases(name, fmt)) for name in ("plain", "overlap"))


def test_without_a_mistake_nothing_is_violated(cases: Callable[..., Case]) -> None:
    assert all_violations(cases, "w4") == all_violations(cases, "w4a3") == 0


def test_lines_swapped(cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Clamp.lines

    def wrong(self: Clamp, low: Tensor, high: Tensor) -> Lines:
        found = right(self, low, high)
        return Lines(found.high_slope, found.high, found.low_slope, found.low)

    monkeypatch.setattr(Clamp, "lines", wrong)
    assert all_violations(cases, "w4") > 0


@pytest.mark.parametrize("factor", [0.9, 1.0])
def test_the_chord_without_its_intercept(
    factor: float, cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slope of the chord, intercept of the identity; or an intercept a tenth too small."""
    right = Clamp.lines

    def wrong(self: Clamp, low: Tensor, high: Tensor) -> Lines:
        found = right(self, low, high)
        return Lines(found.low_slope, found.low, found.high_slope, found.high * (1 - factor))

    monkeypatch.setattr(Clamp, "lines", wrong)
    assert all_violations(cases, "w4") > 0


@pytest.mark.parametrize("kind", [Convolution, Product])
def test_a_bias_left_out(kind: Any, cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    right = kind.__init__

    def wrong(self: Any, weight: Tensor, offset: Tensor | None, *rest: Any) -> None:
        right(self, weight, None, *rest)

    monkeypatch.setattr(kind, "__init__", wrong)
    assert all_violations(cases, "w4") > 0


def test_a_quantizer_taken_for_the_identity(cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(self: Staircase, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high

    def identity(self: Staircase, low: Tensor, high: Tensor) -> Lines:
        one, zero = torch.ones_like(low), torch.zeros_like(low)
        return Lines(one, zero, one, zero)

    monkeypatch.setattr(Staircase, "lines", identity)
    monkeypatch.setattr(Staircase, "range", ends)
    assert all_violations(cases, "w4a3") > 0


def test_signs_of_an_addition_lost(cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Backward._through

    def wrong(self: Backward, place: int, step: Any, rows: Tensor, images: Tensor) -> Any:
        constant, parts = right(self, place, step, rows, images)
        return constant, parts[:1] * len(parts) if hasattr(step, "signs") else parts

    monkeypatch.setattr(Backward, "_through", wrong)
    assert violations(cases("moves")) > 0


ILL = """(float[n,3] x, float[8,3] w1, float[8] b1, float[2,8] w2) => (float[n,2] y) {
    h = Gemm <transB = 1> (x, w1, b1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2)
}"""


def cancelling() -> tuple[Network, Any]:
    """Sums of large terms that cancel: float32 gives something, exact arithmetic something else."""
    generator = np.random.default_rng(3)
    first = (generator.standard_normal((8, 3)) * 3e6).astype(np.float32)
    bias = (-first.astype(np.float64).sum(1) / 3).astype(np.float32)
    twin = build_twin(prepare(parse(ILL, w1=first, b1=bias)))
    return read(twin, (3,)), twin


@pytest.mark.parametrize("dropped", [False, True])
def test_slack_dropped_on_weights_of_bad_scale(dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, twin = cancelling()
    if dropped:
        for place in ("interval", "backward"):
            monkeypatch.setattr(f"qopt.certificates.{place}.slack", lambda map_, size: size.new_zeros(()))
    images = torch.full((200, 3), 1 / 3)
    images += 1e-3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    exact = Ball(images.double(), images.double(), images.double(), None)  # the point itself: rounding is all there is
    box = intervals(network, exact)[-1]
    logits = twin(images).double()
    outside = int(((logits < box.low) | (logits > box.high)).sum())
    assert (outside > 0) == dropped


def test_a_ball_that_forgets_the_box_is_looser_only(cases: Callable[..., Case]) -> None:
    """Not a mistake of soundness, so nothing is violated: the checks tell the two apart."""
    case = cases("plain")
    images = (case.images(2) > 0.5).float()
    network, ball = read(case.twin, case.shape), Ball.around(images, THREAT)
    free = Ball(ball.centre, ball.centre - THREAT.eps - 1e-6, ball.centre + THREAT.eps + 1e-6, None)
    rows = torch.eye(case.classes).expand(2, -1, -1)
    assert bool((Backward(network, free).lower(rows) <= Backward(network, ball).lower(rows) + 1e-4).all())


def test_bounds_that_overflow_say_so() -> None:
    """Infinite or undefined bounds certify nothing."""
    network, _ = cancelling()
    ball = Ball.around(torch.rand(2, 3), THREAT)
    found = Backward(network, ball).lower(torch.full((2, 1, 2), 3e38))
    assert bool((found == -math.inf).all())
