"""The network calculus: nothing found by attack is above what it says, and it says when it says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.certificates.calculus import Claim, NetworkBounds, StepFacts, network_bounds
from qopt.certificates.certificate import certify
from qopt.certificates.local import _SLOPES
from qopt.errors import UsageError
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import Norm, ThreatModel

from .conftest import NETWORKS, Case, ascend, parse, scattered, values_of

NORMS: list[Norm] = ["l2", "linf"]


def size(values: Tensor, norm: Norm) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(values.double().flatten(1), 2 if norm == "l2" else math.inf, 1)
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "fmt"), [*((name, "w4a3") for name in NETWORKS), ("plain", "w4"), ("norm", "w4")])
def test_attacks_stay_below_every_number(name: str, fmt: str, norm: Norm, cases: Callable[..., Case]) -> None:
    case = cases(name, fmt)
    found = network_bounds(case.twin, case.shape, norm, case.float_twin)
    images, threat = case.images(4), ThreatModel(norm, 0.1)
    assert found.unbounded == ()

    def moved(x: Tensor) -> Tensor:
        found: Tensor = ((case.twin(x) - case.twin(images).detach()) ** 2).sum(1)
        return found

    def changed(x: Tensor) -> Tensor:
        found: Tensor = ((case.twin(x) - case.float_twin(x)) ** 2).sum(1)
        return found

    start, wide = values_of(case.twin, images), ThreatModel("linf", 1.0)
    steps = {facts.name: facts for facts in found.steps}
    for points in [*scattered(images, threat, 3), *scattered(images, wide, 2), ascend(moved, images, threat, 8),
                   ascend(changed, images, wide, 8)]:  # fmt: skip
        values, floats = values_of(case.twin, points), values_of(case.float_twin, points)
        distance = size(points - images, norm)
        for node, facts in steps.items():
            assert bool((size(values[node], norm) <= facts.range).all()), node
            change = size(values[node] - start[node], norm)
            assert bool((change <= facts.lipschitz * distance + facts.slack).all()), node
            if node in floats:
                assert bool((size(values[node] - floats[node], norm) <= facts.deviation).all()), node


@pytest.mark.parametrize("norm", NORMS)
def test_a_staircase_has_no_lipschitz_constant(norm: Norm, cases: Callable[..., Case]) -> None:
    """A claim of L alone fails; L with the slack holds."""
    case = cases("plain", "w4a3")
    found = network_bounds(case.twin, case.shape, norm).last
    image = case.images(1)
    broken = False
    for seed in range(40):
        near = image + 1e-5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        change, distance = size(case.twin(near) - case.twin(image), norm), size(near - image, norm)
        broken |= bool(change > found.lipschitz * distance)
        assert bool(change <= found.lipschitz * distance + found.slack)
    line = image + 1e-5 * torch.arange(2000).reshape(-1, 1, 1, 1)  # a step somewhere on it is crossed at once
    change, distance = size(case.twin(line[1:]) - case.twin(line[:-1]), norm), size(line[1:] - line[:-1], norm)
    broken |= bool((change > 1.1 * found.lipschitz * distance).any())
    assert broken
    assert network_bounds(cases("plain", "w4").twin, case.shape, norm).last.slack < 0.01 * found.slack


def test_overlapping_windows_are_attained() -> None:
    """3 x 3 windows at stride 2 hold a pixel four times: the l2 norm doubles, and one image shows it."""
    text = """(float[n,1,5,5] x, float[2,4] w) => (float[n,2] y) {
        p = MaxPool <kernel_shape = [3,3], strides = [2,2]> (x) f = Flatten (p) y = Gemm <transB = 1> (f, w) }"""
    twin = build_twin(prepare(parse(text)))
    pool = network_bounds(twin, (1, 5, 5), "l2").steps[1]
    assert pool.lipschitz == pytest.approx(2.0)
    spot = torch.zeros(1, 1, 5, 5)
    spot[0, 0, 2, 2] = 1.0
    assert float(F.max_pool2d(spot, 3, 2).norm()) == 2.0
    assert network_bounds(twin, (1, 5, 5), "linf").steps[1].lipschitz == pytest.approx(1.0)


def test_a_linear_network_is_exact() -> None:
    text = "(float[n,6] x, float[3,6] w, float[3] b) => (float[n,3] y) { y = Gemm <transB = 1> (x, w, b) }"
    prepared = prepare(parse(text))
    weight = torch.from_numpy(prepared.initializer("w").copy()).double()
    for norm, order in (("l2", 2), ("linf", math.inf)):
        found = network_bounds(build_twin(prepared), (6,), norm).last  # type: ignore[arg-type]
        assert found.lipschitz == pytest.approx(float(torch.linalg.matrix_norm(weight, order)), rel=1e-6)
        assert found.slack < 1e-3


def test_radii_are_certified_by_nothing_tighter_denied(cases: Callable[..., Case]) -> None:
    case = cases("plain", "w4")
    images = case.images(6)
    logits = case.twin(images).detach()
    labels = logits.argmax(1)
    best = logits.topk(2, dim=1).values
    found = network_bounds(case.twin, case.shape, "linf").radii(best[:, 0] - best[:, 1])
    for row, eps in enumerate(found.tolist()):
        part = slice(row, row + 1)
        assert certify(case.twin, images[part], labels[part], ThreatModel("linf", 0.9 * eps)).accuracy == 1.0


ATTENTION = """(float[n,4,6] x, float[6,5] wq, float[6,5] wk, float[6,5] wv, float[5] g, float[5] h, float[3,20] w)
        => (float[n,3] y) {
    q = MatMul (x, wq)
    k0 = MatMul (x, wk)
    k = Transpose <perm = [0,2,1]> (k0)
    v = MatMul (x, wv)
    s = MatMul (q, k)
    a = Softmax <axis = -1> (s)
    o = MatMul (a, v)
    l = LayerNormalization <axis = -1, epsilon = 0.01> (o, g, h)
    e = Gelu (l)
    m = Mul (e, o)
    f = Flatten (m)
    y = Gemm <transB = 1> (f, w)
}"""


@pytest.mark.parametrize("norm", NORMS)
def test_attention_and_normalisation_by_their_local_formulas(norm: Norm) -> None:
    prepared = prepare(parse(ATTENTION))
    twin, other = build_twin(prepared), build_twin(prepared)
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name.startswith("w"):
                buffer += 0.01 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1))
    found = network_bounds(other, (4, 6), norm, twin)
    assert found.unbounded == ()
    images = torch.rand(6, 4, 6, generator=torch.Generator().manual_seed(0))
    start, floats = values_of(other, images), values_of(twin, images)
    for points in scattered(images, ThreatModel("linf", 0.3), 5):
        values, distance = values_of(other, points), size(points - images, norm)
        for facts in found.steps:
            change = size(values[facts.name] - start[facts.name], norm)
            assert bool((change <= facts.lipschitz * distance + facts.slack).all()), facts.name
            assert bool((size(values[facts.name], norm) <= facts.range).all()), facts.name
    for facts in found.steps:
        assert bool((size(start[facts.name] - floats[facts.name], norm) <= facts.deviation).all()), facts.name
    assert str(found.change(0.1)).endswith("(vacuous)")


def test_what_has_no_bound_is_named() -> None:
    text = "(float[n,4] x, float[3,4] w) => (float[n,3] y) { r = Reciprocal (x) y = Gemm <transB = 1> (r, w) }"
    found = network_bounds(build_twin(prepare(parse(text))), (4,))
    assert found.unbounded == ("r (Reciprocal)",)
    assert str(found.change(0.1)) == "unbounded"


@pytest.mark.parametrize("function", list(_SLOPES), ids=lambda f: f.__name__)
def test_slopes_of_bumpy_functions(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    found = float(slope.abs().max())
    assert found <= _SLOPES[function] <= found * 1.001 + 1e-9
    assert float(function(torch.zeros(1))) == 0.0


class TestClaims:
    def test_words(self) -> None:
        assert str(Claim(0.1234, False)) == "0.123"
        assert str(Claim(3.6e8, True)) == "3.6e+08 (vacuous)"
        assert str(Claim(math.inf, True)) == "unbounded"

    def test_when_a_number_says_nothing(self) -> None:
        steps = (StepFacts("y", "Gemm", 2.0, 0.5, 10.0, 3.0),)
        found = NetworkBounds("l2", steps, (), 8.0)
        assert found.change(1.0) == Claim(pytest.approx(2.5), False)  # type: ignore[arg-type]
        assert found.change(1.0, margin=2.0).vacuous
        assert found.change(10.0).vacuous
        assert not found.quantization().vacuous
        assert found.quantization(margin=3.0).vacuous
        assert found.radii(torch.tensor([0.1, 2 * math.sqrt(2)])).tolist() == [0.0, pytest.approx(0.75)]

    def test_a_deep_product_is_vacuous(self, cases: Callable[..., Case]) -> None:
        case = cases("plain", "w4a3")
        found = network_bounds(case.twin, case.shape, "l2", case.float_twin)
        assert str(found.change(1.0)).endswith("(vacuous)")

    def test_one_network_has_no_deviation(self, cases: Callable[..., Case]) -> None:
        with pytest.raises(UsageError, match="two networks"):
            network_bounds(cases("plain").twin, cases("plain").shape).quantization()

    def test_different_structures(self, cases: Callable[..., Case]) -> None:
        one, two = cases("plain"), cases("clipped")
        with pytest.raises(UsageError, match="different structure"):
            network_bounds(one.twin, one.shape, "l2", two.twin if two.shape == one.shape else cases("residual").twin)
