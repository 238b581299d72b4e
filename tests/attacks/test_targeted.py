"""Attacks towards a class: the loss is that class's, and only its prediction counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qopt.attacks import FGSM, PGD, predict
from qopt.attacks.bim import BIM
from qopt.attacks.cw import CW
from qopt.attacks.losses import LOSSES, LossName, Misclassified, cross_entropy
from qopt.attacks.mim import MIM
from qopt.errors import DataError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)]
ATTACKS = [
    FGSM(),
    PGD(steps=8),
    PGD(steps=8, loss="margin", compact=False),
    PGD(loss="dlr"),
    BIM(steps=8),
    MIM(steps=8),
]
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
per_attack = pytest.mark.parametrize("attack", ATTACKS, ids=repr)


@per_threat
@per_attack
def test_fooled_means_the_target(net: nn.Module, data: Data, attack: Any, threat: ThreatModel) -> None:
    images, labels = data
    targets = (labels + 1) % 3
    result = attack(net, images, labels, threat, seed=0, targets=targets)
    assert torch.equal(result.fooled, predict(net, result.adversarial).argmax(1) == targets)
    there = predict(net, images).argmax(1) == targets
    assert torch.equal(result.adversarial[there], images[there])
    assert result.fooled.double().mean() > there.double().mean() + 0.1
    move = (result.adversarial - images).double().flatten(1)
    assert ((move.abs().amax(1) if threat.norm == "linf" else move.norm(dim=1)) <= threat.eps + 1e-6).all()


@per_threat
@per_attack
def test_images_already_at_their_target_come_back(net: nn.Module, data: Data, attack: Any, threat: ThreatModel) -> None:
    images, labels = data
    result = attack(net, images, labels, threat, seed=0, targets=predict(net, images).argmax(1))
    assert torch.equal(result.adversarial, images)
    assert result.fooled.all()


@per_threat
def test_images_that_are_wrong_but_elsewhere_are_attacked(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images = data[0]
    predicted = predict(net, images).argmax(1)
    labels, targets = (predicted + 1) % 3, (predicted + 2) % 3  # wrong for everyone, and never at the target
    result = PGD()(net, images, labels, threat, seed=0, targets=targets)
    assert result.fooled.double().mean() > 0.2
    untargeted = PGD()(net, images, labels, threat, seed=0)
    assert torch.equal(untargeted.adversarial, images)


def test_some_target_succeeds_where_the_untargeted_attack_does(net: nn.Module, data: Data) -> None:
    images, labels = data
    untargeted = PGD()(net, images, labels, THREATS[0], seed=0).fooled
    each = [PGD()(net, images, labels, THREATS[0], seed=0, targets=(labels + k) % 3).fooled for k in (1, 2)]
    assert (untargeted != each[0] | each[1]).sum() <= 2
    assert each[0].sum() < untargeted.sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_targeted_loss_is_the_other_sign(loss: LossName) -> None:
    logits = 3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(5)).double()
    targets = torch.arange(30) % 4
    away, towards = Misclassified(targets, loss), Misclassified(targets, loss, targeted=True)
    assert torch.equal(away.rise(logits), -towards.rise(logits))
    assert torch.equal(away.reached(logits), ~towards.reached(logits))
    assert torch.equal(towards.fallback(logits) > 0, towards.reached(logits))
    assert torch.equal(away.fallback(logits) > 0, away.reached(logits))


def test_log_odds_towards_a_class_are_its_cross_entropy_before_softplus() -> None:
    logits = 3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(6)).double()
    targets = torch.arange(30) % 4
    odds = -cross_entropy(logits, targets)
    assert torch.allclose(-F.logsigmoid(odds), F.cross_entropy(logits, targets, reduction="none"))


def test_one_step_follows_the_gradient_of_the_target(net: nn.Module, data: Data) -> None:
    images, labels = 0.2 + 0.6 * data[0], data[1]
    targets = (labels + 2) % 3
    tracked = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(tracked), targets, reduction="sum"), tracked)
    result = FGSM()(net, images, labels, ThreatModel("linf", 0.03), seed=0, targets=targets)
    attacked = predict(net, images).argmax(1) != targets
    same = (result.adversarial - (images - 0.03 * gradient.sign())).abs() < 1e-6
    assert same[attacked].double().mean() > 0.999


def test_cw_reaches_targets_further_away_than_no_target(net: nn.Module, data: Data) -> None:
    images, labels = data[0][:40], data[1][:40]
    targets = (labels + 1) % 3
    result = CW(steps=60)(net, images, labels, seed=0, targets=targets)
    assert torch.equal(result.fooled, predict(net, result.adversarial).argmax(1) == targets)
    assert result.fooled.all()
    free = CW(steps=60)(net, images, labels, seed=0)
    targeted, untargeted = ((r.adversarial - images).flatten(1).norm(dim=1).mean() for r in (result, free))
    assert targeted > untargeted


@pytest.mark.parametrize("attack", [FGSM(), PGD(), BIM(), MIM(), CW()], ids=repr)
def test_targets_that_do_not_fit_are_refused(net: nn.Module, data: Data, attack: Any) -> None:
    images, labels = data
    threat = () if isinstance(attack, CW) else (THREATS[0],)
    for targets, message in ((labels + 1, "label out of range"), (labels[:-1], "do not fit the images")):
        with pytest.raises(DataError, match=message):
            attack(net, images, labels, *threat, seed=0, targets=targets)
