"""Linear classifiers of two classes: the strongest perturbation is known, so attacks must find exactly it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qopt.attacks import FGSM, PGD, Attack, Classifier
from qopt.attacks.bim import BIM
from qopt.attacks.mim import MIM
from qopt.threat import ThreatModel

COUNT, SIDE = 120, 5


def problem(low: float, high: float) -> tuple[Tensor, Tensor, Tensor, Classifier]:
    """Weights (pixels,), images with pixels between low and high, the classes the model gives them, the model."""
    generator = torch.Generator().manual_seed(9)
    weights = torch.randn(SIDE * SIDE, generator=generator)
    images = low + (high - low) * torch.rand(COUNT, 1, SIDE, SIDE, generator=generator)
    offset = (images.flatten(1) @ weights).median()

    def model(batch: Tensor) -> Tensor:
        score = batch.flatten(1) @ weights - offset
        return torch.stack([-0.5 * score, 0.5 * score], 1)

    return weights, images, model(images).argmax(1), model


def lead(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """How far the label's logit is ahead of the other one."""
    logits = model(images)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.gather(1, 1 - labels[:, None]).squeeze(1)


def best_move(weights: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    """Hoelder's inequality with equality: eps * sign(w) in linf, eps * w / |w| in l2, against the label's side."""
    unit = weights.sign() if threat.norm == "linf" else weights / weights.norm()
    return (threat.eps * unit * (1 - 2 * labels[:, None])).view(-1, 1, SIDE, SIDE)


EXACT: list[Attack] = [
    FGSM(),
    FGSM(loss="margin"),
    PGD(random_start=False),
    PGD(random_start=False, compact=False),
    BIM(),
    MIM(),
    MIM(decay=0.3, compact=False),
]


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.012), ThreatModel("l2", 0.06)], ids=str)
@pytest.mark.parametrize("attack", EXACT, ids=repr)
def test_attacks_reach_the_optimum(attack: Attack, threat: ThreatModel) -> None:
    weights, images, labels, model = problem(0.4, 0.6)
    optimum = images + best_move(weights, labels, threat)
    assert optimum.min() > 0
    assert optimum.max() < 1
    result = attack(model, images, labels, threat, seed=0)
    fooled = lead(model, optimum, labels) < 0
    assert 0.2 < fooled.double().mean() < 0.8
    assert torch.equal(result.fooled, fooled)
    reached = torch.ones_like(fooled) if isinstance(attack, FGSM) or not attack_compacts(attack) else ~fooled
    assert torch.allclose(result.adversarial[reached], optimum[reached], atol=1e-6)


def attack_compacts(attack: Attack) -> bool:
    """Whether fooled images stop on the way to the optimum."""
    return isinstance(attack, PGD | BIM | MIM) and attack.compact


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.012), ThreatModel("l2", 0.06)], ids=str)
def test_random_starts_end_at_the_same_accuracy(threat: ThreatModel) -> None:
    weights, images, labels, model = problem(0.4, 0.6)
    fooled = lead(model, images + best_move(weights, labels, threat), labels) < 0
    result = PGD(steps=40)(model, images, labels, threat, seed=0)
    assert int((result.fooled != fooled).sum()) <= 1
    assert (result.fooled <= fooled).all()


def test_the_box_clips_the_linf_optimum() -> None:
    """Per pixel the best move is the longest legal one, so clipping the sign step stays optimal at the walls."""
    weights, images, labels, model = problem(0.0, 1.0)
    threat = ThreatModel("linf", 0.15)
    optimum = (images + best_move(weights, labels, threat)).clamp(0, 1)
    assert (optimum - images).abs().min() < threat.eps / 2
    fooled = lead(model, optimum, labels) < 0
    for attack in (FGSM(), PGD(random_start=False)):
        result = attack(model, images, labels, threat, seed=0)
        assert torch.equal(result.fooled, fooled)
        assert torch.allclose(result.adversarial[~fooled], optimum[~fooled], atol=1e-6)


def test_on_black_and_white_pixels_l2_spends_all_of_eps_on_pixels_that_can_move() -> None:
    weights, images, _, model = problem(0.0, 1.0)
    images = images.round()
    labels = model(images).argmax(1)
    threat = ThreatModel("l2", 0.5)
    move = best_move(weights, labels, threat)
    free = torch.where((images + move.sign() * 0.1).clamp(0, 1) != images, move, 0.0)
    optimum = images + threat.eps * free / free.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    result = FGSM()(model, images, labels, threat, seed=0)
    assert torch.allclose(result.adversarial, optimum, atol=1e-6)
    naive = (images + move).clamp(0, 1)
    assert (lead(model, result.adversarial, labels) < lead(model, naive, labels)).all()
