from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qopt.attacks import PGD, dead_gradients
from qopt.attacks.gradient import LossName, cross_entropy, dlr, input_gradient, margin, unusable
from qopt.errors import UsageError
from qopt.threat import Norm, ThreatModel


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.double().flatten(1), b.double().flatten(1))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_log_odds_are_cross_entropy_before_its_softplus(classes: int) -> None:
    logits = 3 * torch.randn(50, classes, generator=torch.Generator().manual_seed(classes)).double()
    labels = torch.arange(50) % classes
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(F.softplus(cross_entropy(logits, labels)), expected, atol=1e-10)


def test_margin_against_a_loop() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [5.0, -1.0, -2.0]])
    assert margin(logits, torch.tensor([0, 2, 0])).tolist() == [3.0, -2.0, -6.0]


def test_dlr_against_a_loop() -> None:
    logits = 4 * torch.randn(60, 5, generator=torch.Generator().manual_seed(8)).double()
    labels = torch.arange(60) % 5
    expected = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ordered = sorted(row, reverse=True)
        others = max(value for index, value in enumerate(row) if index != label)
        expected.append(-(row[label] - others) / (ordered[0] - ordered[2]))
    assert dlr(logits, labels).tolist() == pytest.approx(expected)
    assert torch.allclose(dlr(7 * logits - 30, labels), dlr(logits, labels))


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(UsageError, match=r"dlr needs three classes .*got 2.*margin"):
        dlr(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("values", "dead"),
    [
        ([0.0, 0.0], True),
        ([-0.0, 0.0], True),
        ([1e-45, 0.0], False),
        ([-3.0, 0.0], False),
        ([torch.nan, 1.0], True),
        ([1.0, -torch.inf], True),
        ([3e38, 3e38], False),
    ],
)
def test_which_gradients_are_unusable(values: list[float], dead: bool) -> None:
    gradient = torch.tensor([values, [1.0, 2.0]]).view(2, 1, 1, 2)
    assert unusable(gradient).tolist() == [dead, False]


def test_gradients_have_the_direction_of_cross_entropy(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    images, labels = data
    tracked = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(net(tracked), labels, reduction="sum"), tracked)
    assert cosines(input_gradient(net, images, labels, "cross_entropy"), expected).min() > 0.99999


def test_confidence_does_not_saturate_the_gradient(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Logits times 1000 leave plain float32 cross-entropy without a gradient on right images; ours keeps it."""
    images, labels = data

    def confident(batch: Tensor) -> Tensor:
        logits: Tensor = 1000 * net(batch)
        return logits

    tracked = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(F.cross_entropy(confident(tracked), labels, reduction="sum"), tracked)
    assert unusable(plain).double().mean() > 0.5
    assert not dead_gradients(confident, images, labels).any()
    ours = input_gradient(confident, images, labels, "cross_entropy")
    assert cosines(ours, input_gradient(net, images, labels, "margin")).mean() > 0.9
    threat = ThreatModel("linf", 0.05)
    attacked = PGD(loss="margin")(net, images, labels, threat, seed=0).fooled
    assert abs(int(PGD()(confident, images, labels, threat, seed=0).fooled.sum()) - int(attacked.sum())) <= 3


def test_margin_steps_in_where_cross_entropy_cancels() -> None:
    """Two wrong classes as likely as each other in float32 pull with equal force against each other."""

    def cancelling(images: Tensor) -> Tensor:
        pixel = images.flatten(1)[:, 0]
        return torch.stack([torch.full_like(pixel, 0.2), pixel, -pixel], 1)

    images, labels = torch.full((2, 1, 2, 2), 1e-12), torch.zeros(2, dtype=torch.long)
    images[1, 0, 0, 0] = 0.05
    assert dead_gradients(cancelling, images, labels).tolist() == [True, False]
    assert not unusable(input_gradient(cancelling, images, labels, "margin")).any()
    for norm in get_args(Norm):
        result = PGD(random_start=False)(cancelling, images, labels, ThreatModel(norm, 0.3), seed=0)
        assert result.fooled.all()


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, pixels: Tensor) -> Tensor:
        return pixels.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[:, 0] = torch.nan
        return spoiled


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.5), ThreatModel("l2", 0.9)], ids=str)
def test_what_is_not_finite_is_left_out_of_the_step(threat: ThreatModel) -> None:
    def model(images: Tensor) -> Tensor:
        total: Tensor = NanGradient.apply(images.flatten(1)).sum(1)  # type: ignore[no-untyped-call]
        return torch.stack([total, 2 - total], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.6), torch.zeros(3, dtype=torch.long)
    assert dead_gradients(model, images, labels).all()
    result = PGD(random_start=False)(model, images, labels, threat, seed=0)
    assert result.fooled.all()
    assert torch.equal(result.adversarial.flatten(1)[:, 0], images.flatten(1)[:, 0])


@pytest.mark.parametrize("detach", [True, False])
def test_a_model_without_any_gradient_is_dead_and_no_error(detach: bool) -> None:
    weight = torch.ones(4, requires_grad=True)

    def model(images: Tensor) -> Tensor:
        total = images.detach().flatten(1) @ (weight.detach() if detach else weight)
        return torch.stack([total, 2 - total], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.6), torch.zeros(3, dtype=torch.long)
    assert dead_gradients(model, images, labels, batch_size=2).all()
    result = PGD(random_start=False)(model, images, labels, ThreatModel("linf", 0.3), seed=0)
    assert torch.equal(result.adversarial, images)
    assert not result.fooled.any()
    assert weight.grad is None


def test_images_without_gradient_are_not_asked_again() -> None:
    asked = 0

    def constant(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    PGD(steps=50)(constant, torch.rand(10, 1, 4, 4), torch.zeros(10, dtype=torch.long), ThreatModel(), seed=0)
    assert asked <= 10 * 4  # the clean score, one step with its fallback, the final score


@pytest.mark.parametrize("compact", [True, False])
def test_images_that_run_onto_a_plateau_stay_there(compact: bool) -> None:
    def plateau(images: Tensor) -> Tensor:
        pixel = images.flatten(1)[:, 0]
        return torch.stack([1 + (pixel - 0.55).relu(), torch.zeros_like(pixel)], 1)

    images, labels = torch.tensor([0.7, 0.5]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    attack = PGD(random_start=False, compact=compact)
    result = attack(plateau, images, labels, ThreatModel("linf", 0.4), seed=0)
    assert result.adversarial.flatten().tolist() == pytest.approx([0.5, 0.5])
    assert not result.fooled.any()


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_flow_whatever_mode_the_caller_is_in(
    net: nn.Module, data: tuple[Tensor, Tensor], loss: LossName, mode: type[torch.no_grad] | type[torch.inference_mode]
) -> None:
    images, labels = data
    threat, attack = ThreatModel("linf", 0.05), PGD(steps=3, loss=loss)
    expected = attack(net, images, labels, threat, seed=0)
    with mode():
        found = attack(net, images.clone(), labels.clone(), threat, seed=0)
        assert not dead_gradients(net, images.clone(), labels.clone()).any()
    assert torch.equal(found.adversarial, expected.adversarial)
