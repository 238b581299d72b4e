"""FAB against closed forms, and its projection against a linear and a quadratic program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from qopt.attacks import PGD, Classifier, accuracy_vector, keep_within, predict
from qopt.attacks.fab import FAB
from qopt.attacks.fab_projection import shortest_move
from qopt.errors import ModelError, UsageError
from qopt.threat import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)
Data = tuple[Tensor, Tensor]
Projection = Callable[[Tensor, Tensor, Tensor, Norm], Tensor]
per_norm = pytest.mark.parametrize("norm", NORMS)


def lengths(moves: Tensor, norm: Norm) -> Tensor:
    rows = moves.flatten(1)
    return rows.abs().amax(1) if norm == "linf" else rows.norm(dim=1)


def problem(seed: int, count: int, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the box, some coordinates at its walls; normals, some entries zero; amounts, most within reach."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, dims, generator=generator).double()
    points = torch.where(torch.rand(count, dims, generator=generator) < 0.2, points.round(), points)
    normals = torch.randn(count, dims, generator=generator).double()
    normals = torch.where(torch.rand(count, dims, generator=generator) < 0.2, 0.0, normals)
    amounts = 0.4 * dims**0.5 * torch.randn(count, generator=generator).double()
    return points, normals, amounts


def reach(point: Tensor, normal: Tensor, amount: float) -> float:
    """The largest change of the product in the direction of ``amount`` that the box allows."""
    toward = normal * (1.0 if amount >= 0 else -1.0)
    return float((toward.clamp(min=0) * (1 - point) + (-toward).clamp(min=0) * point).sum())


def program(point: Tensor, normal: Tensor, amount: float, norm: Norm) -> float:
    """The least length of a move within the box that changes the product by ``amount``, by scipy."""
    x, w, dims = point.numpy(), normal.numpy(), len(point)
    if norm == "linf":
        above = np.block([[np.eye(dims), -np.ones((dims, 1))], [-np.eye(dims), -np.ones((dims, 1))]])
        found = linprog(
            np.eye(dims + 1)[-1], A_ub=above, b_ub=np.zeros(2 * dims), A_eq=np.append(w, 0.0)[None], b_eq=[amount],
            bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
        )  # fmt: skip
        assert found.status == 0
        return float(found.fun)
    solved: Any = minimize(
        lambda d: 0.5 * d @ d, np.zeros(dims), jac=lambda d: d, bounds=list(zip(-x, 1 - x, strict=True)),
        constraints={"type": "eq", "fun": lambda d: w @ d - amount, "jac": lambda d: w}, method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert solved.success
    return float(np.linalg.norm(solved.x))


def check_projection(project: Projection, norm: Norm, seed: int, count: int = 12, dims: int = 7) -> int:
    """Compare with the program wherever the hyperplane is within reach; returns for how many that was."""
    points, normals, amounts = problem(seed, count, dims)
    moves = project(points, normals, amounts, norm)
    assert (points + moves >= -1e-12).all()
    assert (points + moves <= 1 + 1e-12).all()
    compared = 0
    for point, normal, amount, move in zip(points, normals, amounts.tolist(), moves, strict=True):
        most = reach(point, normal, amount)
        if most <= abs(amount):
            assert float(normal @ move) == pytest.approx(most * np.sign(amount), abs=1e-9)
            continue
        assert float(normal @ move) == pytest.approx(amount, abs=1e-9)
        assert float(lengths(move[None], norm)) == pytest.approx(program(point, normal, amount, norm), abs=2e-6)
        compared += 1
    return compared


@per_norm
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_solves_the_program(norm: Norm, seed: int) -> None:
    assert check_projection(shortest_move, norm, seed) >= 4


def blind_to_the_box(points: Tensor, normal: Tensor, amount: Tensor, norm: Norm) -> Tensor:
    """Planted bug: the free projection, clipped afterwards, stops short of the hyperplane."""
    step = (
        normal.sign() / normal.abs().sum(1, keepdim=True)
        if norm == "linf"
        else normal / normal.square().sum(1)[:, None]
    )
    return (points + amount[:, None] * step).clamp(0, 1) - points


def not_shortest(points: Tensor, normal: Tensor, amount: Tensor, norm: Norm) -> Tensor:
    """Planted bug: the move of the other norm."""
    return shortest_move(points, normal, amount, "l2" if norm == "linf" else "linf")


@per_norm
@pytest.mark.parametrize("wrong", [blind_to_the_box, not_shortest])
def test_the_check_of_the_projection_catches(wrong: Projection, norm: Norm) -> None:
    with pytest.raises(AssertionError):
        check_projection(wrong, norm, 0)


@per_norm
@given(seed=st.integers(0, 10**6), dims=st.integers(1, 40), scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]))
@settings(max_examples=60)
def test_moves_are_legal_at_any_scale_in_float32(norm: Norm, seed: int, dims: int, scale: float) -> None:
    points, normals, amounts = problem(seed, 6, dims)
    moves = shortest_move(points.float(), (scale * normals).float(), (scale * amounts).float(), norm)
    assert moves.isfinite().all()
    assert ((points + moves) > -1e-6).all()
    assert ((points + moves) < 1 + 1e-6).all()
    exact = shortest_move(points, normals, amounts, norm)
    assert (moves - exact).abs().max() < 1e-3


@per_norm
def test_no_gradient_or_no_distance_no_move(norm: Norm) -> None:
    points = torch.tensor([[0.2, 0.9], [0.2, 0.9], [0.0, 1.0]])
    normals = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-1.0, 1.0]])
    moves = shortest_move(points, normals, torch.tensor([1.0, 0.0, 1.0]), norm)
    assert moves.tolist() == [[0, 0], [0, 0], [0, 0]]  # the last one stands in the corner it would head for


def linear_problem(classes: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor, Classifier]:
    """Weights (25, classes), images with pixels between low and high, the classes the model gives them, the model."""
    generator = torch.Generator().manual_seed(17)
    weights = torch.randn(25, classes, generator=generator)
    images = low + (high - low) * torch.rand(80, 1, 5, 5, generator=generator)
    offset = (images.flatten(1) @ weights).mean(0)

    def model(batch: Tensor) -> Tensor:
        return batch.flatten(1) @ weights - offset

    return weights, images, model(images).argmax(1), model


def closest(weights: Tensor, logits: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """Distance to the nearest boundary, (n,): the lead over the dual norm of the difference of the weights."""
    own = logits.gather(1, labels[:, None])
    differences = weights[:, labels].T[:, :, None] - weights[None]
    dual = differences.abs().sum(1) if norm == "linf" else differences.norm(dim=1)
    return ((own - logits) / dual).scatter(1, labels[:, None], torch.inf).amin(1)


@per_norm
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_linear_classifiers_have_the_closed_form(norm: Norm, classes: int) -> None:
    weights, images, labels, model = linear_problem(classes, 0.4, 0.6)
    expected = closest(weights, predict(model, images), labels, norm)
    assert expected.max() < (0.4 if norm == "linf" else 2.0)
    result = FAB(norm, steps=20)(model, images, labels, seed=0)
    assert result.fooled.all()
    found = lengths(result.adversarial - images, norm)
    far = expected > 1e-4  # nearer than that it is all rounding
    assert far.sum() > 70
    assert (found[far] / expected[far]).max() < 1.002
    assert (found[far] / expected[far]).min() > 0.999


@per_norm
def test_the_box_is_part_of_the_linear_problem(norm: Norm) -> None:
    """Black and white images of two classes: the program of scipy is the exact answer."""
    weights, images, _, model = linear_problem(2, 0.0, 1.0)
    images = images.round()[:12]
    logits = predict(model, images).double()
    labels = logits.argmax(1)
    result = FAB(norm, steps=60)(model, images, labels, seed=0)
    assert result.fooled.all()
    found = lengths((result.adversarial - images).double(), norm)
    normal = (weights[:, 1] - weights[:, 0]).double()
    for row in range(12):
        amount = float(logits[row, 0] - logits[row, 1])
        exact = program(images[row].flatten().double(), normal, amount, norm)
        assert float(found[row]) == pytest.approx(exact, rel=5e-3, abs=1e-5)


@per_norm
def test_the_target_that_is_closest_wins(norm: Norm) -> None:
    """With one target only the most likely class is tried, which need not be the nearest."""
    _, images, labels, model = linear_problem(6, 0.4, 0.6)
    one, all_of_them = (FAB(norm, steps=20, targets=t)(model, images, labels, seed=0) for t in (1, 99))
    near, far = (lengths(result.adversarial - images, norm) for result in (all_of_them, one))
    assert (near <= far + 1e-6).all()
    assert (near < 0.95 * far).any()


@per_norm
def test_results_are_legal_and_true(net: nn.Module, data: Data, norm: Norm) -> None:
    images, labels = data
    before = images.clone()
    result = FAB(norm, steps=10)(net, images, labels, seed=0)
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(result.correct, accuracy_vector(net, result.adversarial, labels))
    wrong_before = ~accuracy_vector(net, images, labels)
    assert wrong_before.any()
    assert torch.equal(result.adversarial[wrong_before], images[wrong_before])
    assert result.fooled.double().mean() > 0.95
    assert torch.equal(images, before)
    assert all(p.grad is None for p in net.parameters())


@per_norm
def test_eps_changes_who_leaves_and_not_who_is_fooled_within_it(net: nn.Module, data: Data, norm: Norm) -> None:
    images, labels = data
    threat = ThreatModel(norm, 0.05 if norm == "linf" else 0.35)
    searched = keep_within(FAB(norm, steps=15)(net, images, labels, seed=0), images, threat)
    asked = 0

    def counted(batch: Tensor) -> Tensor:
        nonlocal asked
        asked += len(batch)
        logits: Tensor = net(batch)
        return logits

    sieved = FAB(norm, threat.eps, steps=15)(counted, images, labels, seed=0)
    with_eps, asked = asked, 0
    FAB(norm, steps=15)(counted, images, labels, seed=0)
    assert abs(int(keep_within(sieved, images, threat).fooled.sum()) - int(searched.fooled.sum())) <= 1
    assert with_eps < 0.8 * asked


@per_norm
def test_restarts_and_steps_only_come_closer(net: nn.Module, data: Data, norm: Norm) -> None:
    images, labels = (tensor[:24] for tensor in data)
    right = accuracy_vector(net, images, labels)
    found = [
        lengths(FAB(norm, steps=12, restarts=restarts)(net, images, labels, seed=1).adversarial - images, norm)[right]
        for restarts in (1, 2, 4)
    ]
    assert (found[1] <= found[0]).all()
    assert (found[2] <= found[1]).all()
    if norm == "l2":  # in linf, noise in every pixel is a poor place to start from
        assert found[2].mean() < found[0].mean()


@per_norm
def test_fab_is_closer_than_any_ball_that_pgd_needs(net: nn.Module, data: Data, norm: Norm) -> None:
    """The share that FAB fools within eps is about what PGD fools at that eps."""
    images, labels = data
    threat = ThreatModel(norm, 0.04 if norm == "linf" else 0.3)
    fab = keep_within(FAB(norm, steps=15)(net, images, labels, seed=0), images, threat)
    pgd = PGD()(net, images, labels, threat, seed=0)
    assert int(fab.fooled.sum()) >= int(pgd.fooled.sum()) - 2


def test_one_seed_one_result(net: nn.Module, data: Data) -> None:
    images, labels = (tensor[:12] for tensor in data)
    first, again, other = (FAB("l2", steps=8, restarts=4)(net, images, labels, seed=s).adversarial for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_without_any_gradient_is_left_alone() -> None:
    asked = 0

    def constant(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        return torch.tensor([[1.0, 0.0, 0.5]]).repeat(len(images), 1)

    images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for norm in NORMS:
        asked = 0
        result = FAB(norm)(constant, images, torch.zeros(10, dtype=torch.long), seed=0)
        assert not result.fooled.any()
        assert torch.equal(result.adversarial, images)
        assert asked <= 10 * 4


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, pixels: Tensor) -> Tensor:
        return pixels.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[:, 0] = torch.inf
        return spoiled


@per_norm
def test_what_is_not_finite_is_left_out_of_the_step(norm: Norm) -> None:
    def model(images: Tensor) -> Tensor:
        total: Tensor = Spoiled.apply(images.flatten(1)).sum(1)  # type: ignore[no-untyped-call]
        return torch.stack([total, 2 - total], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.6), torch.zeros(3, dtype=torch.long)
    result = FAB(norm)(model, images, labels, seed=0)
    assert result.fooled.all()
    assert torch.equal(result.adversarial.flatten(1)[:, 0], images.flatten(1)[:, 0])


@per_norm
def test_a_logit_that_is_not_finite_under_attack_is_an_error(norm: Norm) -> None:
    def spoiled(images: Tensor) -> Tensor:
        total = images.flatten(1).sum(1)
        return torch.stack([total, torch.where(total == 2.0, total / 2, torch.nan)], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"image 0: .*not finite"):
        FAB(norm)(spoiled, images, labels, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be .*got 0"),
        ({"restarts": 0}, "restarts must be"),
        ({"targets": 0}, "targets must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"norm": "l1"}, "unknown norm .*linf or l2.*'l1'"),
        ({"eps": -1.0}, "eps must be a finite number, zero or larger"),
        ({"eps": float("nan")}, "eps must be a finite number"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FAB(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("attack", "name"), [(FAB(), "FAB-T"), (FAB("l2", 0.5, steps=20, restarts=3), "FAB-T-20x3")])
def test_names(attack: FAB, name: str) -> None:
    assert attack.name == name
