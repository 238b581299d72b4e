"""The attacks of torchattacks and foolbox, where those are right: MIM is not in foolbox, CW is not in torchattacks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qopt.api import load
from qopt.attacks import FGSM, PGD, accuracy_vector
from qopt.attacks.bim import BIM
from qopt.attacks.cw import CW
from qopt.attacks.mim import MIM
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import Norm, ThreatModel

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

EPS = 0.05
Data = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """A network, images in [0, 1] with labels, and radii."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: dict[Norm, float]


@pytest.fixture(scope="module", params=["small", pytest.param("public", marks=pytest.mark.assets)])
def problem(request: pytest.FixtureRequest) -> Problem:
    """The small network on synthetic images, and an adversarially trained residual network for CIFAR-10."""
    if request.param == "small":
        images, labels = request.getfixturevalue("data")
        return Problem(copy.deepcopy(request.getfixturevalue("net")), images, labels, {"linf": EPS, "l2": 0.35})
    assets: Path = request.getfixturevalue("assets")
    twin = build_twin(prepare(load(assets / "onnx" / "vresnet2b_cifar10_adv2.onnx")))
    with np.load(assets / "data" / "cifar10_small.npz") as file:
        images = torch.from_numpy(file["x_test"][:60].astype(np.float32) / np.float32(255))
        labels = torch.from_numpy(file["y_test"][:60].astype(np.int64))
    twin.register_parameter("unused", nn.Parameter(torch.zeros(1)))  # by which torchattacks finds the device
    return Problem(twin.eval(), images, labels, {"linf": 2 / 255, "l2": 0.25})


def ours(attack: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    """Our images, and which of them were right before: the others are not attacked."""
    found = attack(problem.model, problem.images, problem.labels, ThreatModel("linf", problem.eps["linf"]), seed=0)
    return found.adversarial, accuracy_vector(problem.model, problem.images, problem.labels)


def equal_share(ours: Tensor, theirs: Tensor, rows: Tensor) -> float:
    return float(((ours - theirs).abs() < 1e-6)[rows].double().mean())


@pytest.mark.parametrize("name", ["FGSM", "BIM", "MIM"])
def test_pixels_equal_those_of_torchattacks(problem: Problem, name: str) -> None:
    eps, steps = problem.eps["linf"], 10
    step = eps / 4
    attack: Any = {"FGSM": FGSM(), "BIM": BIM(steps, step, compact=False), "MIM": MIM(steps, step, compact=False)}[name]
    options: dict[str, float] = {"eps": eps} if name == "FGSM" else {"eps": eps, "alpha": step, "steps": steps}
    library: Any = getattr(torchattacks, "MIFGSM" if name == "MIM" else name)
    found, right = ours(attack, problem)
    expected = library(problem.model, **options)(problem.images, problem.labels)
    # Where the last step does not fool but an earlier one did, ours is the earlier image.
    fooled, theirs = (~accuracy_vector(problem.model, images, problem.labels) for images in (found, expected))
    rows = right & (fooled == theirs)
    assert rows.sum() >= right.sum() - 2
    assert equal_share(found, expected, rows) >= 0.999
    assert not (theirs & right & ~fooled).any()


def foolbox_images(attack: Any, problem: Problem, **options: float) -> Tensor:
    model = foolbox.PyTorchModel(problem.model, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(problem.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images: Tensor = attack.run(model, problem.images, criterion, **options)
    return images


def test_bim_pixels_equal_those_of_foolbox(problem: Problem) -> None:
    eps = problem.eps["linf"]
    found, right = ours(BIM(10, eps / 4, compact=False), problem)
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=eps / 4, steps=10)
    expected = foolbox_images(attack, problem, epsilon=eps)
    left, theirs = (accuracy_vector(problem.model, images, problem.labels) for images in (found, expected))
    assert equal_share(found, expected, right & (left == theirs)) >= 0.999


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_leaves_as_much_accuracy_as_that_of_foolbox(problem: Problem, norm: Norm) -> None:
    eps = problem.eps[norm]
    left = PGD()(problem.model, problem.images, problem.labels, ThreatModel(norm, eps), seed=0).correct
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    theirs = foolbox_images(kind(abs_stepsize=eps / 4, steps=20, random_start=True), problem, epsilon=eps)
    right = accuracy_vector(problem.model, problem.images, problem.labels)
    expected = right & accuracy_vector(problem.model, theirs, problem.labels)
    assert left.sum() <= expected.sum() + 1
    if norm == "linf":  # in l2 ours spends nothing on the walls of the box, and may be the stronger by more
        assert left.sum() >= expected.sum() - 1


@pytest.mark.parametrize("constant", [1e-3, 1.0])
def test_cw_is_as_near_as_that_of_foolbox(problem: Problem, constant: float) -> None:
    few = Problem(problem.model, problem.images[:30], problem.labels[:30], problem.eps)
    found = CW()(few.model, few.images, few.labels, seed=0)
    steps = 9 if constant < 1 else 5
    attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=steps, steps=100, initial_const=constant)
    theirs = foolbox_images(attack, few)
    right = accuracy_vector(few.model, few.images, few.labels)
    fooled = ~accuracy_vector(few.model, theirs, few.labels) & (theirs != 0).flatten(1).any(1)
    assert (found.fooled & right).sum() >= (fooled & right).sum()
    both = right & found.fooled & fooled
    assert both.sum() > 15
    lengths = [(images - few.images).flatten(1).norm(dim=1)[both].mean() for images in (found.adversarial, theirs)]
    assert lengths[0] <= 1.02 * lengths[1]
