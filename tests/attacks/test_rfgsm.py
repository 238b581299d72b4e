from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import FGSM, accuracy_vector, predict
from qopt.attacks.ball import direction, random_halfway
from qopt.attacks.gradient import input_gradient
from qopt.attacks.rfgsm import RFGSM
from qopt.errors import UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREATS = [ThreatModel("linf", 0.08), ThreatModel("l2", 0.5)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_it_is_a_random_half_step_and_a_gradient_half_step(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    """The paper's two lines, written out; the box clips, and nothing else does."""
    images, labels = data
    right = accuracy_vector(net, images, labels)
    start = random_halfway(images, threat, seed=3, indices=torch.arange(len(images)), restart=0)
    gradient = input_gradient(net, start, labels, "cross_entropy")
    expected = (start + threat.eps / 2 * direction(gradient, start, threat.norm)).clamp(0, 1)
    found = RFGSM()(net, images, labels, threat, seed=3)
    fooled_at_start = predict(net, start).argmax(1) != labels
    ended = predict(net, expected).argmax(1) != labels
    rows = right & (ended | ~fooled_at_start)
    assert rows.sum() > 100
    assert torch.allclose(found.adversarial[rows], expected[rows], atol=1e-6)
    assert torch.equal(found.fooled[right], (ended | fooled_at_start)[right])


def test_pixels_end_at_zero_or_at_eps(net: nn.Module, data: Data) -> None:
    """In linf the halves add up or cancel."""
    images = 0.3 + 0.4 * data[0]
    labels = predict(net, images).argmax(1)
    threat = ThreatModel("linf", 0.1)
    move = (RFGSM()(net, images, labels, threat, seed=0).adversarial - images).abs()
    at_zero, at_eps = (torch.isclose(move, torch.tensor(value), atol=1e-6) for value in (0.0, threat.eps))
    # where the random half already fooled and the gradient took it back, the random half is what is returned
    halves = torch.isclose(move, torch.tensor(threat.eps / 2), atol=1e-6)
    assert (at_zero | at_eps | halves).double().mean() > 0.999
    assert 0.3 < at_eps.double().mean() < 0.7


def masked_at_data(net: nn.Module, images: Tensor) -> nn.Module:
    """The network with a bend at exactly the clean images: its gradient there points the wrong way."""

    class Bent(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            known = (batch.detach()[:, None] == images[None]).flatten(2).all(2).any(1)
            logits: Tensor = net(torch.where(known.view(-1, 1, 1, 1), 2 * batch.detach() - batch, batch))
            return logits

    return Bent()


def test_it_gets_around_a_bend_at_the_clean_image(net: nn.Module, data: Data) -> None:
    images, labels = data
    bent = masked_at_data(net, images)
    threat = ThreatModel("linf", 0.08)
    one, two = (attack(bent, images, labels, threat, seed=0) for attack in (FGSM(), RFGSM()))
    assert two.correct.double().mean() < one.correct.double().mean() - 0.1


def test_seeds_and_numbers(net: nn.Module, data: Data) -> None:
    images, labels = data
    threat = THREATS[0]
    whole = RFGSM()(net, images, labels, threat, seed=1).adversarial
    part = torch.tensor([140, 3, 77])
    alone = RFGSM()(net, images[part], labels[part], threat, seed=1, indices=part).adversarial
    assert torch.allclose(alone, whole[part], atol=1e-6)
    assert not torch.equal(RFGSM()(net, images, labels, threat, seed=2).adversarial, whole)


@pytest.mark.parametrize(
    ("options", "message"), [({"loss": "hinge"}, "unknown loss"), ({"batch_size": 0}, "batch_size must be")]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RFGSM(**options)  # type: ignore[arg-type]
