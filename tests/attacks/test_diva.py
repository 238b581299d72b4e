from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import PGD, Attack, accuracy_vector
from qopt.attacks.diva import DIVA, evasive_rate
from qopt.errors import DataError, ModelError, UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREATS = [ThreatModel("linf", 0.08), ThreatModel("l2", 0.6)]
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


@pytest.fixture(scope="module")
def coarse(net: nn.Module) -> nn.Module:
    """The same network with weights rounded to three values or so per layer."""
    copy = type(net)()
    copy.load_state_dict({name: coarsely(value) for name, value in net.state_dict().items()})
    return copy.eval()


def coarsely(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / 2
    return (weight / scale).round() * scale


def rate(attack: Attack, net: nn.Module, coarse: nn.Module, data: Data, threat: ThreatModel) -> tuple[float, float]:
    """Evasive rate, and share of all images that the coarse network gets wrong."""
    images, labels = data
    result = attack(coarse, images, labels, threat, seed=0)
    found = evasive_rate(
        accuracy_vector(net, result.adversarial, labels),
        result.correct,
        accuracy_vector(net, images, labels),
        accuracy_vector(coarse, images, labels),
    )
    return found, float(result.fooled.double().mean())


@per_threat
@pytest.mark.parametrize("compact", [True, False])
def test_it_is_more_evasive_than_pgd(
    net: nn.Module, coarse: nn.Module, data: Data, threat: ThreatModel, compact: bool
) -> None:
    plain, fooled_by_pgd = rate(PGD(compact=False), net, coarse, data, threat)
    evasive, fooled = rate(DIVA(net, compact=compact), net, coarse, data, threat)
    assert evasive > 1.5 * plain
    assert evasive > 0.1
    assert fooled > 0.1
    assert fooled_by_pgd > 0.1


@per_threat
def test_results_are_legal_and_true(net: nn.Module, coarse: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, labels = data
    attack: Attack = DIVA(net, batch_size=40)
    result = attack(coarse, images, labels, threat, seed=0)
    assert torch.equal(result.correct, accuracy_vector(coarse, result.adversarial, labels, 40))
    move = (result.adversarial - images).double().flatten(1)
    assert ((move.abs().amax(1) if threat.norm == "linf" else move.norm(dim=1)) <= threat.eps + 1e-6).all()
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    wrong = ~accuracy_vector(coarse, images, labels)
    assert wrong.any()
    assert torch.equal(result.adversarial[wrong], images[wrong])


@per_threat
def test_compaction_loses_no_evasive_image(net: nn.Module, coarse: nn.Module, data: Data, threat: ThreatModel) -> None:
    """Images leave when they are evasive, not when the quantized network alone is fooled."""
    images, labels = data
    found = []
    for compact in (True, False):
        result = DIVA(net, compact=compact)(coarse, images, labels, threat, seed=0)
        found.append(result.fooled & accuracy_vector(net, result.adversarial, labels))
    assert torch.equal(found[0], found[1])


def test_the_step_is_the_papers(net: nn.Module, coarse: nn.Module, data: Data) -> None:
    """One step from the clean image, against the gradient of the paper's difference of probabilities."""
    images, labels = 0.1 + 0.8 * data[0], data[1]
    threat = ThreatModel("linf", 0.02)
    for c in (0.3, 1.0, 4.0):
        tracked = images.clone().requires_grad_()
        own, other = (m(tracked).double().softmax(1).gather(1, labels[:, None]).sum() for m in (net, coarse))
        (gradient,) = torch.autograd.grad(own - c * other, tracked)
        attack = DIVA(net, c=c, steps=1, step=0.02, random_start=False)
        found = attack(coarse, images, labels, threat, seed=0).adversarial
        rows = accuracy_vector(coarse, images, labels)
        expected = (images + 0.02 * gradient.sign()).clamp(0, 1)
        assert ((found - expected).abs() < 1e-6)[rows].double().mean() > 0.999


def test_a_network_is_never_evaded_by_itself(net: nn.Module, data: Data) -> None:
    evasive, _ = rate(DIVA(net), net, net, data, THREATS[0])
    assert evasive == 0.0


def test_a_heavier_quantized_network_is_fooled_more_often(net: nn.Module, coarse: nn.Module, data: Data) -> None:
    rates = [rate(DIVA(net, c=c), net, coarse, data, THREATS[0])[1] for c in (0.2, 1.0, 20.0)]
    assert rates[0] < rates[2]
    assert rates[1] <= rates[2] + 0.02


def test_seeds_numbers_and_batches(net: nn.Module, coarse: nn.Module, data: Data) -> None:
    images, labels = data
    whole = DIVA(net, steps=5)(coarse, images, labels, THREATS[0], seed=1)
    part = torch.arange(149, 9, -7)
    alone = DIVA(net, steps=5)(coarse, images[part], labels[part], THREATS[0], seed=1, indices=part)
    assert torch.equal(alone.fooled, whole.fooled[part])
    batched = DIVA(net, steps=5, batch_size=11)(coarse, images, labels, THREATS[0], seed=1)
    assert torch.equal(batched.fooled, whole.fooled)
    other = DIVA(net, steps=5)(coarse, images, labels, THREATS[0], seed=2)
    assert not torch.equal(other.adversarial, whole.adversarial)


def test_evasive_rate_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.rand(200, generator=generator) > 0.4 for _ in range(4)]
    reference, quantized, clean_reference, clean_quantized = (v.tolist() for v in vectors)
    evasive = counted = 0
    for i in range(200):
        if clean_reference[i] and clean_quantized[i]:
            counted += 1
            evasive += reference[i] and not quantized[i]
    assert evasive_rate(*vectors) == pytest.approx(evasive / counted)


def yes(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ((yes(3), yes(3), yes(4), yes(3)), "four vectors of booleans"),
        ((yes(3), torch.ones(3), yes(3), yes(3)), "four vectors of booleans"),
        ((yes(3), yes(3), ~yes(3), yes(3)), "no clean image is right in both"),
        ((yes(0), yes(0), yes(0), yes(0)), "no clean image is right in both"),
    ],
)
def test_vectors_that_give_no_rate_are_refused(vectors: tuple[Tensor, Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evasive_rate(*vectors)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: DIVA(f, c=0.0), "DIVA: c must be"),
        (lambda f: DIVA(f, steps=0), "steps must be"),
        (lambda f: DIVA(f, step=-1.0), "step must be"),
        (lambda f: DIVA(f, batch_size=0), "batch_size must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    net: nn.Module, build: Callable[[nn.Module], DIVA], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(net)


def test_networks_of_other_classes_are_refused(net: nn.Module, data: Data) -> None:
    def wider(images: Tensor) -> Tensor:
        return torch.cat([net(images), net(images)], 1)

    with pytest.raises(ModelError, match=r"other classes .*expected 3.*got 6"):
        DIVA(wider)(net, *data, THREATS[0], seed=0)
    assert DIVA(net).name == "DIVA-20"
