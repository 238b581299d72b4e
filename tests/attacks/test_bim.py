from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import PGD, accuracy_vector
from qopt.attacks.bim import BIM
from qopt.errors import UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREATS = [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("compact", [True, False])
def test_it_is_pgd_from_the_clean_image(net: nn.Module, data: Data, threat: ThreatModel, compact: bool) -> None:
    ours = BIM(steps=7, compact=compact)(net, *data, threat, seed=0)
    pgd = PGD(steps=7, random_start=False, compact=compact)(net, *data, threat, seed=0)
    assert torch.equal(ours.adversarial, pgd.adversarial)


def by_the_book(net: nn.Module, data: Data, eps: float, step: float, steps: int) -> Tensor:
    """Kurakin et al. 2017, eq. 2, with plain cross-entropy in float32."""
    images, labels = data
    found = images
    for _ in range(steps):
        tracked = found.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(tracked), labels), tracked)
        moved = found + step * gradient.sign()
        found = torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
    return found


def test_it_is_the_papers_recurrence(net: nn.Module, data: Data) -> None:
    images, labels = data
    eps, step, steps = 0.06, 0.02, 6
    expected = by_the_book(net, data, eps, step, steps)
    right = accuracy_vector(net, images, labels)
    found = BIM(steps=steps, step=step, compact=False)(net, images, labels, ThreatModel("linf", eps), seed=0)
    same = (found.adversarial - expected).abs() < 1e-6
    assert same[right & found.fooled].double().mean() > 0.999


@pytest.mark.parametrize(
    ("pixels", "steps"),
    [(1, 1), (2, 2), (4, 5), (8, 10), (16, 20), (17, 21), (32, 36), (0.3, 1), (0.0, 1), (0.5, 1), (255, 259)],
)
def test_iterations_of_kurakin(pixels: float, steps: int) -> None:
    assert BIM.kurakin(pixels / 255) == BIM(steps=steps, step=1 / 255)


@pytest.mark.parametrize("pixels", range(1, 64))
def test_iterations_of_kurakin_in_whole_numbers(pixels: int) -> None:
    assert BIM.kurakin(pixels / 255).steps == max(1, min(pixels + 4, 5 * pixels // 4))


def test_seeds_change_nothing(net: nn.Module, data: Data) -> None:
    first, other = (BIM(steps=4)(net, *data, THREATS[0], seed=seed).adversarial for seed in (0, 1))
    assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be .*got 0"),
        ({"batch_size": 0}, "batch_size must be .*got 0"),
        ({"step": -1.0}, "BIM: step must be"),
        ({"loss": "hinge"}, "unknown loss"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BIM(**options)  # type: ignore[arg-type]
