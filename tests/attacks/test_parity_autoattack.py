"""The parts of AutoAttack against pyautoattack at the same budget: robust accuracy within one point.

Without the package the module is skipped by name. Small networks in the tests; a public one where QOPT_ASSETS is set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qopt.api import load
from qopt.attacks import Attack, Classifier, accuracy_vector
from qopt.attacks.apgd import APGD
from qopt.attacks.autoattack import Within
from qopt.attacks.fab import FAB
from qopt.attacks.square import Square
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.measure.network import TwinClassifier
from qopt.threat import Norm, ThreatModel

pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

NORMS: tuple[Norm, ...] = get_args(Norm)
CLASSES = 6
Data = tuple[Tensor, Tensor]
Reference = Callable[..., Any]


def reference(kind: str, model: Classifier, threat: ThreatModel, budget: int, targets: int) -> Any:
    """The attack of the package: ``budget`` steps or queries."""
    common: dict[str, Any] = {
        "eps": threat.eps, "norm": {"linf": "Linf", "l2": "L2"}[threat.norm], "device": "cpu", "seed": 0,
    }  # fmt: skip
    if kind == "ce":
        return APGDAttack(model, n_iter=budget, loss="ce", **common)
    if kind == "dlr":
        return APGDAttack(model, n_iter=budget, loss="dlr", **common)
    if kind == "targeted":
        return APGDAttack_targeted(model, n_iter=budget, n_target_classes=targets, **common)
    if kind == "fab":
        return FABAttack_PT(model, n_iter=budget, targeted=True, n_target_classes=targets, **common)
    return SquareAttack(model, n_queries=budget, resc_schedule=True, p_init=0.8, **common)


def ours(kind: str, threat: ThreatModel, budget: int, targets: int, batch_size: int = 128) -> Attack:
    """The same attack of qopt."""
    if kind == "ce":
        return APGD(steps=budget, batch_size=batch_size)
    if kind == "dlr":
        return APGD("dlr", steps=budget, batch_size=batch_size)
    if kind == "targeted":
        return APGD("dlr", steps=budget, targets=targets, batch_size=batch_size)
    if kind == "fab":
        return Within(FAB(threat.norm, threat.eps, steps=budget, targets=targets, batch_size=batch_size))
    return Square(budget, batch_size=batch_size)


def accuracies(
    kind: str, model: Classifier, data: Data, threat: ThreatModel, budget: int, targets: int
) -> tuple[float, float]:
    """Robust accuracy under our attack and under the package's, in percent."""
    images, labels = data
    right = accuracy_vector(model, images, labels)
    own = ours(kind, threat, budget, targets)(model, images, labels, threat, seed=0)
    with torch.random.fork_rng(devices=[]):
        attack = reference(kind, model, threat, budget, targets)
        made = attack.perturb(images[right].clone(), labels[right].clone()).detach()
    move = (made - images[right]).flatten(1)
    distance = move.abs().amax(1) if threat.norm == "linf" else move.norm(dim=1)
    assert (distance <= threat.eps + 1e-6).all()
    left = int(accuracy_vector(model, made, labels[right]).sum())
    return 100 * float(own.correct.double().mean()), 100 * left / len(images)


class SixNet(nn.Module):
    """Two convolutions and a linear layer: one class for each of six patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(256, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.second(F.relu(self.first(images - 0.5))))
        logits: Tensor = self.last(hidden.flatten(1))
        return logits


def six_images(count: int, seed: int) -> Data:
    """Smooth patterns under noise, (count, 1, 8, 8)."""
    patterns = F.interpolate(
        torch.randn(CLASSES, 1, 3, 3, generator=torch.Generator().manual_seed(21)), size=(8, 8), mode="bilinear"
    )
    labels = torch.arange(count) % CLASSES
    noise = 0.12 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.15 * patterns[labels] + noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def six_net() -> SixNet:
    images, labels = six_images(900, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = SixNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval().requires_grad_(False)


BUDGETS = {"ce": 30, "dlr": 30, "targeted": 15, "fab": 10, "square": 120}


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.03), ThreatModel("l2", 0.25)], ids=str)
@pytest.mark.parametrize("kind", BUDGETS)
def test_six_classes(six_net: SixNet, kind: str, threat: ThreatModel) -> None:
    """120 images: one of them is 0.8 points. Untargeted, the dlr ends at whichever class its start was nearest to."""
    own, other = accuracies(kind, six_net, six_images(120, 2), threat, BUDGETS[kind], targets=3)
    assert 10 < other < 97
    assert own <= other + (2.0 if kind == "dlr" else 1.0)
    if kind != "square":  # the package's squares leave out the last row and column, much of an 8 x 8 image
        assert abs(own - other) <= 2.0


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)], ids=str)
@pytest.mark.parametrize("kind", ["ce", "dlr", "fab"])
def test_three_classes(net: nn.Module, data: Data, kind: str, threat: ThreatModel) -> None:
    """The network of the other tests, 150 images; the package has no targeted DLR for three classes."""
    alone = copy.deepcopy(net)  # the package leaves gradients on the parameters
    own, other = accuracies(kind, alone, data, threat, BUDGETS[kind], targets=2)
    assert own <= other + 1.0
    assert abs(own - other) <= 2.0


@pytest.mark.parametrize("norm", NORMS)
def test_fab_is_as_close(six_net: SixNet, norm: Norm) -> None:
    """Mean distortion without a bound, one target: at most one percent more than the package's."""
    images, labels = six_images(60, 3)
    right = accuracy_vector(six_net, images, labels)
    images, labels = images[right], labels[right]
    own = FAB(norm, steps=20, targets=1)(six_net, images, labels, seed=0)
    made = reference("fab", six_net, ThreatModel(norm, 1e6), 20, 1).perturb(images, labels).detach()
    lengths = [
        move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
        for move in ((own.adversarial - images).flatten(1), (made - images).flatten(1))
    ]
    both = own.fooled & (lengths[1] > 0)
    assert both.double().mean() > 0.95
    assert lengths[0][both].mean() <= 1.01 * lengths[1][both].mean()


@pytest.fixture(scope="module")
def public(assets: Path) -> tuple[Classifier, Data]:
    """The adversarially trained residual network and the first 200 test images of CIFAR-10."""
    twin = build_twin(prepare(load(assets / "onnx" / "vresnet2b_cifar10_adv2.onnx")))
    with np.load(assets / "data" / "cifar10_small.npz") as file:
        images = torch.from_numpy(file["x_test"][:200].astype(np.float32) / 255)
        labels = torch.from_numpy(file["y_test"][:200].astype(np.int64))
    return TwinClassifier(twin.requires_grad_(False)), (images, labels)


@pytest.mark.assets
@pytest.mark.parametrize(("kind", "budget"), [("ce", 20), ("targeted", 8), ("fab", 5), ("square", 100)])
def test_a_public_robust_network(public: tuple[Classifier, Data], kind: str, budget: int) -> None:
    own, other = accuracies(kind, *public, ThreatModel("linf", 2 / 255), budget, targets=3)
    assert 50 < other < 70
    assert abs(own - other) <= 1.0
