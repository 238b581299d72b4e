from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qopt.attacks import accuracy_vector
from qopt.attacks.bim import BIM
from qopt.attacks.mim import MIM
from qopt.errors import UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREATS = [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)]


def by_the_book(net: nn.Module, data: Data, threat: ThreatModel, step: float, steps: int, decay: float) -> Tensor:
    """Dong et al. 2018, Algorithm 1 (eq. 6, 7) and its l2 form (eq. 8), one image at a time."""
    images, labels = data
    done = []
    for image, label in zip(torch.split(images, 1), torch.split(labels, 1), strict=True):
        found, momentum = image, torch.zeros_like(image)
        for _ in range(steps):
            tracked = found.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(tracked), label), tracked)
            momentum = decay * momentum + gradient / gradient.abs().sum()
            if threat.norm == "linf":
                move = found + step * momentum.sign() - image
                found = (image + move.clamp(-threat.eps, threat.eps)).clamp(0, 1)
            else:
                move = found + step * momentum / momentum.norm() - image
                found = (image + move * min(1.0, threat.eps / float(move.norm()))).clamp(0, 1)
        done.append(found)
    return torch.cat(done)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_it_is_the_papers_recurrence(net: nn.Module, data: Data, threat: ThreatModel, decay: float) -> None:
    images, labels = 0.2 + 0.6 * data[0][:40], data[1][:40]  # away from the box, where our l2 steps are cleverer
    steps, step = 6, threat.eps / 3
    expected = by_the_book(net, (images, labels), threat, step, steps, decay)
    found = MIM(steps=steps, step=step, decay=decay, compact=False)(net, images, labels, threat, seed=0)
    attacked = accuracy_vector(net, images, labels)
    ended = attacked & (~found.fooled | ~accuracy_vector(net, expected, labels))
    assert ended.sum() > 20
    same = (found.adversarial - expected).abs() < 1e-5
    assert same[ended].double().mean() > 0.998


def test_signs_that_are_summed_instead_of_gradients_are_another_attack(net: nn.Module, data: Data) -> None:
    """Foolbox sums signs: the comparison above must be able to tell."""
    images, labels = 0.2 + 0.6 * data[0][:40], data[1][:40]
    threat, steps = THREATS[0], 6
    found = images
    momentum = torch.zeros_like(images)
    for _ in range(steps):
        tracked = found.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(tracked), labels), tracked)
        momentum = momentum + gradient.sign()
        found = (images + (found + threat.eps / 3 * momentum.sign() - images).clamp(-threat.eps, threat.eps)).clamp(
            0, 1
        )
    expected = by_the_book(net, (images, labels), threat, threat.eps / 3, steps, 1.0)
    assert ((found - expected).abs() < 1e-5).double().mean() < 0.98


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_without_memory_it_is_bim(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    forgetful, bim = (attack(net, *data, threat, seed=0) for attack in (MIM(steps=5, decay=0.0), BIM(steps=5)))
    assert torch.allclose(forgetful.adversarial, bim.adversarial, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_carries_over_a_plateau(norm: str) -> None:
    """No gradient between 0.45 and 0.55: BIM stays there, the sum of earlier gradients goes on."""

    def model(images: Tensor) -> Tensor:
        pixel = images.flatten(1)[:, 0]
        lead = (pixel - 0.55).relu() + 0.2 - (0.45 - pixel).relu() * 10
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    images, labels = torch.full((2, 1, 1, 1), 0.7), torch.zeros(2, dtype=torch.long)
    threat = ThreatModel(norm, 0.5)  # type: ignore[arg-type]
    stuck, carried = (attack(model, images, labels, threat, seed=0) for attack in (BIM(step=0.08), MIM(step=0.08)))
    assert not stuck.fooled.any()
    assert carried.fooled.all()


def test_seeds_change_nothing(net: nn.Module, data: Data) -> None:
    first, other = (MIM(steps=4)(net, *data, THREATS[0], seed=seed).adversarial for seed in (0, 1))
    assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be .*got 0"),
        ({"step": 0.0}, "MIM: step must be"),
        ({"decay": -0.1}, "decay must be"),
        ({"decay": float("nan")}, "decay must be"),
        ({"loss": "hinge"}, "unknown loss"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MIM(**options)  # type: ignore[arg-type]
