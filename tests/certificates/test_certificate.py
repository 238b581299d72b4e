"""Certificates of whole networks: closed forms, attacks that must not contradict them, agreement of two networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qopt.attacks.pgd import PGD
from qopt.certificates.ball import Ball
from qopt.certificates.certificate import METHODS, Method, agreement, certify, radii, specification
from qopt.certificates.interval import intervals
from qopt.certificates.read import read
from qopt.errors import CorruptModelError, DataError, UnsupportedModelError, UsageError
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import ThreatModel

from .conftest import NETWORKS, THREATS, Case, along, ascend, parse, project, scattered

LINEAR = "(float[n,6] x, float[3,6] w, float[3] b) => (float[n,3] y) { y = Gemm <transB = 1> (x, w, b) }"
TINY = """(float[n,5] x, float[4,5] w1, float[4] b1, float[3,4] w2, float[3] b2) => (float[n,3] y) {
    h = Gemm <transB = 1> (x, w1, b1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2, b2)
}"""


@pytest.mark.parametrize("method", ["backward-interval", "backward"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_network_has_a_closed_form(norm: str, method: Method) -> None:
    """``margin - eps |w_y - w_j|`` in the dual norm, while the box is out of reach."""
    model = prepare(parse(LINEAR))
    images = torch.full((4, 6), 0.5) + torch.linspace(-0.1, 0.1, 24).reshape(4, 6)
    weight = torch.from_numpy(model.initializer("w").copy()).double()
    bias = torch.from_numpy(model.initializer("b").copy()).double()
    labels, eps, dual = torch.tensor([0, 1, 2, 1]), 0.2, 1 if norm == "linf" else 2
    found = certify(build_twin(model), images, labels, ThreatModel(norm, eps), method=method)  # type: ignore[arg-type]
    logits = images.double() @ weight.T + bias
    for image, label in enumerate(labels.tolist()):
        margins = [
            logits[image, label] - logits[image, j] - eps * (weight[label] - weight[j]).norm(p=dual)
            for j in range(3) if j != label
        ]  # fmt: skip
        if found.margins[image] <= 0 or method == "backward":
            assert float(found.margins[image]) == pytest.approx(float(min(margins)), abs=3e-5)


def test_the_l2_ball_knows_the_box() -> None:
    """At pixels of 0 and 1 the bound is better than the ball's alone, and never above what a dense search finds."""
    rows = torch.tensor([[1.0, -2.0, 0.5]])
    images = torch.tensor([[0.0, 1.0, 0.5]])
    ball = Ball.around(images, ThreatModel("l2", 0.4))
    found = float(ball.smallest(rows))
    centre = float((rows.double() * images).sum())
    assert found > centre - 0.4 * float(rows.norm()) + 0.5
    many = images.repeat(5000, 1)
    noise = torch.randn(many.shape, generator=torch.Generator().manual_seed(0))
    assert found <= float((project(many + noise, many, ThreatModel("l2", 0.4)) @ rows[0]).min())


def test_intervals_of_one_layer_are_the_extremes_over_corners() -> None:
    model = prepare(parse(TINY))
    twin, images, eps = build_twin(model), torch.rand(1, 5, generator=torch.Generator().manual_seed(2)), 0.1
    boxes = intervals(read(twin, (5,)), Ball.around(images, ThreatModel("linf", eps)))
    low, high = (images - eps).clamp(0, 1)[0], (images + eps).clamp(0, 1)[0]
    corners = torch.stack([torch.stack([torch.where(torch.tensor(bit), h, low_) for bit, low_, h in
                                        zip(bits, low, high, strict=True)])
                           for bits in product([False, True], repeat=5)])  # fmt: skip
    weight, bias = (torch.from_numpy(model.initializer(name).copy()).double() for name in ("w1", "b1"))
    hidden = corners.double() @ weight.T + bias
    assert torch.allclose(boxes[1].low[0], hidden.amin(0), atol=1e-4)
    assert torch.allclose(boxes[1].high[0], hidden.amax(0), atol=1e-4)


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.02), ThreatModel("l2", 0.1)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_image_that_pgd_breaks_is_certified(name: str, threat: ThreatModel, cases: Callable[..., Case]) -> None:
    case = cases(name, "w4a3")
    images = case.images(6)
    labels = case.twin(images).argmax(1)
    left = PGD(steps=8, loss="margin")(case.twin, images, labels, threat, seed=0).correct
    points = ascend(lambda x: _worst(case.twin(x), labels), images, threat, 10)
    for method in METHODS:
        found = certify(case.twin, images, labels, threat, method=method)
        assert not bool((found.certified & ~left).any())
        assert bool((found.margins <= -_worst(case.twin(points), labels).detach().double()).all())


def _worst(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None])
    return (logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own[:, 0]).float()


@pytest.mark.parametrize("name", ["plain", "residual", "overlap", "norm"])
def test_tighter_methods_certify_more(name: str, cases: Callable[..., Case]) -> None:
    case, threat = cases(name, "w4"), ThreatModel("linf", 0.01)
    images = case.images(20)
    labels = case.twin(images).argmax(1)
    shares = [certify(case.twin, images, labels, threat, method=m).accuracy for m in METHODS]
    assert shares == sorted(shares)
    assert shares[-1] > 0


def test_wrong_images_and_zero_eps(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    images = case.images(8)
    labels = case.twin(images).argmax(1)
    assert certify(case.twin, images, labels, ThreatModel("linf", 0.0)).accuracy == 1.0
    assert certify(case.twin, images, (labels + 1) % 4, ThreatModel("linf", 0.0)).accuracy == 0.0
    none = certify(case.twin, images[:0], labels[:0], THREATS[0])
    assert none.accuracy == 0.0
    assert len(none.margins) == 0


def test_radii_are_certified_and_nearly_largest(cases: Callable[..., Case]) -> None:
    case = cases("plain", "w4")
    images, threat = case.images(6), ThreatModel("linf", 0.1)
    labels = case.twin(images).argmax(1)
    labels[-1] = (labels[-1] + 1) % 4
    found = radii(case.twin, images, labels, threat, steps=6)
    assert float(found[-1]) == -1
    for row, eps in enumerate(found[:-1].tolist()):
        one = (case.twin, images[row : row + 1], labels[row : row + 1])
        assert bool(certify(*one, ThreatModel("linf", eps)).certified)
        if eps < 0.1:
            assert not bool(certify(*one, ThreatModel("linf", eps + 0.1 / 2**5)).certified)


@pytest.mark.parametrize(
    ("name", "fmt"), [*((name, "w4a3") for name in NETWORKS), ("plain", "w4"), ("overlap", "w4"), ("smooth", "w8a8")]
)
def test_agreement_bounds_what_quantization_changes(name: str, fmt: str, cases: Callable[..., Case]) -> None:
    case, threat = cases(name, fmt), ThreatModel("linf", 0.02)
    images = case.images(2)
    found = {m: agreement(case.twin, case.float_twin, images, threat, method=m) for m in METHODS}

    def change(x: Tensor) -> Tensor:
        return case.twin(x) - case.float_twin(x)  # type: ignore[no-any-return]

    points = [*scattered(images, threat, 4), images]
    points.append(ascend(lambda x: (change(x) ** 2).sum(1), images, threat, 8))
    eye = torch.eye(case.classes)[:2]
    points += [ascend(along(change, row, sign), images, threat, 8) for row in eye for sign in (1.0, -1.0)]
    for x in points:
        moved = change(x).detach().double()
        for bound in found.values():
            assert bool(((bound.low <= moved) & (moved <= bound.high)).all())
            assert bool((moved.norm(dim=1) <= bound.l2).all())
            assert bool((moved.abs().amax(1) <= bound.linf).all())
    assert float(found["backward"].l2.mean()) <= float(found["interval"].l2.mean())


def test_a_network_agrees_with_itself_up_to_the_relaxation() -> None:
    """Linear parts cancel exactly: two copies of a linear network differ by rounding alone."""
    twin = build_twin(prepare(parse(LINEAR)))
    found = agreement(twin, twin, torch.rand(3, 6), ThreatModel("linf", 0.3))
    assert float(found.linf.max()) < 1e-4
    loose = agreement(twin, twin, torch.rand(3, 6), ThreatModel("linf", 0.3), method="interval")
    assert float(loose.linf.min()) > 0.1


def test_specification_rows() -> None:
    rows = specification(torch.tensor([1, 0]), 3)
    assert rows.tolist() == [[[-1, 1, 0], [0, 1, -1]], [[1, -1, 0], [1, 0, -1]]]


UNSUPPORTED = {
    "Softmax": "(float[n,4] x, float[4,4] w) => (float[n,4] y) { h = MatMul (x, w) y = Softmax (h) }",
    "Mul": "(float[n,4] x, float[4,4] w) => (float[n,4] y) { h = MatMul (x, w) y = Mul (h, h) }",
    "Gelu": "(float[n,4] x, float[4,4] w) => (float[n,4] y) { h = Gelu (x) y = MatMul (h, w) }",
}


@pytest.mark.parametrize("op", UNSUPPORTED)
@pytest.mark.parametrize("method", METHODS)
def test_an_unsupported_operator_is_named(op: str, method: Method) -> None:
    twin = build_twin(prepare(parse(UNSUPPORTED[op])))
    with pytest.raises(UnsupportedModelError, match=rf"^node '.*': operator {op} is not supported by (inter|back)"):
        certify(twin, torch.rand(2, 4), torch.tensor([0, 1]), THREATS[0], method=method)


class TestErrors:
    @pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([0, 9]), torch.tensor([0.0, 1.0])])
    def test_labels(self, labels: Tensor, cases: Callable[..., Case]) -> None:
        case = cases("plain")
        with pytest.raises(DataError, match="labels"):
            certify(case.twin, case.images(2), labels, THREATS[0])

    @pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
    def test_pixels(self, value: float, cases: Callable[..., Case]) -> None:
        case = cases("plain")
        images = case.images(1)
        images[0, 0, 0, 0] = value
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            certify(case.twin, images, torch.tensor([0]), THREATS[0])

    def test_method(self, cases: Callable[..., Case]) -> None:
        with pytest.raises(UsageError, match="interval, backward-interval, backward"):
            certify(cases("plain").twin, cases("plain").images(1), torch.tensor([0]), THREATS[0], method="magic")  # type: ignore[arg-type]

    def test_networks_that_cannot_be_compared(self, cases: Callable[..., Case]) -> None:
        with pytest.raises(UnsupportedModelError, match="cannot be compared"):
            agreement(cases("plain").twin, cases("residual").twin, cases("plain").images(1), THREATS[0])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, value: float) -> None:
        twin = build_twin(prepare(parse(LINEAR)))
        twin.get_buffer("w")[0, 0] = value
        with pytest.raises(CorruptModelError, match=r"^w: "):
            certify(twin, torch.rand(1, 6), torch.tensor([0]), THREATS[0])


@pytest.mark.assets
def test_a_trained_network_is_certified(assets: Path) -> None:
    """The public network of least size: most images at 0.05, none that PGD breaks."""
    twin = build_twin(prepare(load_model(assets / "onnx" / "cnn_mnist_madrytiny.onnx")))
    with np.load(assets / "data" / "mnist_small.npz") as file:
        images, labels = torch.from_numpy(file["x_test"][:50]) / 255, torch.from_numpy(file["y_test"][:50]).long()
    threat = ThreatModel("linf", 0.05)
    found = certify(twin, images, labels, threat)
    assert found.accuracy >= 0.85
    assert not bool((found.certified & ~PGD(steps=10)(twin, images, labels, threat, seed=0).correct).any())
