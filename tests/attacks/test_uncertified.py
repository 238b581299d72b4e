"""Certified images leave before the attack, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import PGD, Classifier, Uncertified, predict
from qopt.certificates.certificate import certify
from qopt.errors import DataError
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import module_to_onnx
from qopt.graph.twin import build_twin
from qopt.measure.network import TwinClassifier
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREAT = ThreatModel("linf", 0.03)


class Counting:
    """A classifier that notes which images it was asked about with gradients."""

    def __init__(self, model: Classifier) -> None:
        self.model, self.seen = model, 0

    def __call__(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            self.seen += len(images)
        return self.model(images)


def test_no_mask_is_the_attack_itself(net: nn.Module, data: Data) -> None:
    images, labels = data
    none = torch.zeros(len(images), dtype=torch.bool)
    alone = PGD(steps=5)(net, images, labels, THREAT, seed=1)
    found = Uncertified(PGD(steps=5), none)(net, images, labels, THREAT, seed=1)
    assert torch.equal(found.adversarial, alone.adversarial)
    assert torch.equal(found.fooled, alone.fooled)
    assert Uncertified(PGD(steps=5), none).name == "PGD-5"


def test_certified_images_are_left_alone_and_cost_nothing(net: nn.Module, data: Data) -> None:
    images, labels = data
    alone = PGD(steps=5)(net, images, labels, THREAT, seed=1)
    certified = alone.correct & (torch.arange(len(images)) % 2 == 0)
    counting = Counting(net)
    found = Uncertified(PGD(steps=5), certified)(counting, images, labels, THREAT, seed=1)
    assert torch.equal(found.fooled, alone.fooled)
    assert torch.equal(found.adversarial[certified], images[certified])
    assert torch.equal(found.adversarial[~certified], alone.adversarial[~certified])
    whole = Counting(net)
    PGD(steps=5)(whole, images, labels, THREAT, seed=1)
    assert counting.seen < whole.seen


def test_by_the_number_of_the_image(net: nn.Module, data: Data) -> None:
    images, labels = data
    certified = torch.zeros(len(images), dtype=torch.bool)
    certified[50:] = True
    attack = Uncertified(PGD(steps=5), certified)
    whole = attack(net, images, labels, THREAT, seed=1)
    rows = torch.arange(40, 60)
    part = attack(net, images[rows], labels[rows], THREAT, seed=1, indices=rows)
    assert torch.equal(part.fooled, whole.fooled[rows])
    assert torch.equal(part.adversarial, whole.adversarial[rows])


def test_all_certified(net: nn.Module, data: Data) -> None:
    images, _ = data
    labels = predict(net, images).argmax(1)
    labels[3] = (labels[3] + 1) % 3
    found = Uncertified(PGD(), torch.ones(len(images), dtype=torch.bool))(net, images, labels, THREAT, seed=0)
    assert torch.equal(found.adversarial, images)
    assert found.fooled.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("mask", [torch.zeros(149, dtype=torch.bool), torch.zeros(150)])
def test_wrong_masks(net: nn.Module, data: Data, mask: Tensor) -> None:
    with pytest.raises(DataError, match="one boolean per image"):
        Uncertified(PGD(), mask)(net, *data, THREAT, seed=0)


def test_with_real_certificates(net: nn.Module, data: Data) -> None:
    """What is certified is what the attack would not have fooled: the accuracy is the same."""
    images, _ = data
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for layer in (plain[1], plain[3]):
            nn.init.normal_(layer.weight, std=0.3)  # type: ignore[arg-type]
    twin = build_twin(prepare(module_to_onnx(plain.eval(), (1, 8, 8))))
    classifier = TwinClassifier(twin)
    labels = predict(classifier, images).argmax(1)
    certificate = certify(twin, images, labels, THREAT)
    assert 0 < int(certificate.certified.sum()) < len(images)
    alone = PGD(steps=10)(classifier, images, labels, THREAT, seed=2)
    found = Uncertified(PGD(steps=10), certificate.certified)(classifier, images, labels, THREAT, seed=2)
    assert torch.equal(found.fooled, alone.fooled)
