"""What must hold of every part of AutoAttack and of the suite, on every network and in every norm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import PGD, Attack, AttackResult, Classifier, accuracy_vector, predict, worst_case
from qopt.attacks.apgd import APGD
from qopt.attacks.autoattack import AutoAttack, Within, standard
from qopt.attacks.batches import attack_right, likely_classes
from qopt.attacks.fab import FAB
from qopt.attacks.gradient import check_indices
from qopt.attacks.pyautoattack_backend import PartName, ReferencePart, reference_parts
from qopt.attacks.square import Square
from qopt.errors import DataError, UsageError
from qopt.threat import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)
THREATS = [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)]
Data = tuple[Tensor, Tensor]
Maker = Callable[[ThreatModel, int], Attack]


def short_suite(threat: ThreatModel, batch_size: int) -> tuple[Attack, ...]:
    return (
        APGD(steps=5, batch_size=batch_size),
        APGD("dlr", steps=5, targets=2, batch_size=batch_size),
        Within(FAB(threat.norm, threat.eps, steps=5, batch_size=batch_size)),
        Square(40, batch_size=batch_size),
    )


MAKERS: dict[str, Maker] = {
    "ce": lambda threat, size: APGD(steps=6, restarts=2, batch_size=size),
    "dlr": lambda threat, size: APGD("dlr", steps=6, batch_size=size),
    "targeted": lambda threat, size: APGD("dlr", steps=5, targets=2, batch_size=size),
    "fab": lambda threat, size: Within(FAB(threat.norm, threat.eps, steps=8, batch_size=size)),
    "square": lambda threat, size: Square(60, batch_size=size),
    "suite": lambda threat, size: AutoAttack(short_suite(threat, size)),
}
per_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


def check_legal(result: AttackResult, model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel) -> None:
    """Inside the ball and the box, scored truly, wrong images left alone."""
    move = (result.adversarial - images).double().flatten(1)
    distances = move.abs().amax(1) if threat.norm == "linf" else move.norm(dim=1)
    assert result.adversarial.shape == images.shape
    assert result.adversarial.dtype == torch.float32
    assert (distances <= threat.eps + 1e-6).all()
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(result.correct, accuracy_vector(model, result.adversarial, labels))
    wrong = ~accuracy_vector(model, images, labels)
    assert torch.equal(result.adversarial[wrong], images[wrong])
    assert result.fooled[wrong].all()


@per_threat
@per_maker
def test_results_are_legal_and_true(ste_net: nn.Module, data: Data, make: Maker, threat: ThreatModel) -> None:
    images, labels = data
    before = images.clone()
    state = torch.random.get_rng_state()
    attack = make(threat, 64)
    result = attack(ste_net, images, labels, threat, seed=0)
    check_legal(result, ste_net, images, labels, threat)
    assert result.correct.sum() < accuracy_vector(ste_net, images, labels).sum()
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in ste_net.parameters())


@per_threat
def test_the_check_catches_planted_bugs(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, labels = data
    good = APGD(steps=5)(net, images, labels, threat, seed=0)
    move = good.adversarial - images
    wrong = (~accuracy_vector(net, images, labels)).view(-1, 1, 1, 1)
    for bad in (
        AttackResult((images + 1.5 * move).clamp(0, 1), good.fooled),  # leaves the ball
        AttackResult(good.adversarial, torch.ones_like(good.fooled)),  # believes its own success
        AttackResult(good.adversarial, good.fooled & ~wrong.flatten()),  # forgets the images that were wrong before
        AttackResult(torch.where(wrong, images + 0.001, good.adversarial), good.fooled),  # attacks them
        AttackResult(good.adversarial.double(), good.fooled),
    ):
        with pytest.raises((AssertionError, DataError)):
            check_legal(bad, net, images, labels, threat)


@pytest.mark.parametrize("norm", NORMS)
@per_maker
def test_eps_zero_is_clean_accuracy(net: nn.Module, data: Data, make: Maker, norm: Norm) -> None:
    images, labels = (tensor[:40] for tensor in data)
    threat = ThreatModel(norm, 0.0)
    result = make(threat, 64)(net, images, labels, threat, seed=0)
    assert torch.equal(result.adversarial, images)
    assert torch.equal(result.correct, accuracy_vector(net, images, labels))


@per_threat
@per_maker
def test_batches_and_parts_change_nothing(net: nn.Module, data: Data, make: Maker, threat: ThreatModel) -> None:
    images, labels = (tensor[:24] for tensor in data)
    whole = make(threat, 64)(net, images, labels, threat, seed=0)
    part = torch.arange(23, 5, -3)
    alone = make(threat, 64)(net, images[part], labels[part], threat, seed=0, indices=part)
    assert torch.equal(alone.fooled, whole.fooled[part])
    for batch_size in (2, 1000):
        other = make(threat, batch_size)(net, images, labels, threat, seed=0)
        assert torch.equal(other.fooled, whole.fooled)
        assert (other.adversarial - whole.adversarial).abs().flatten(1).amax(1).median() < 1e-4


@per_threat
@per_maker
@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_changes_nothing(
    net: nn.Module, data: Data, make: Maker, threat: ThreatModel, shift: float
) -> None:
    images, labels = (tensor[:60] for tensor in data)
    plain, shifted = (
        make(threat, 64)(model, images, labels, threat, seed=0) for model in (net, lambda batch: net(batch) + shift)
    )
    assert int((plain.fooled != shifted.fooled).sum()) <= 1


@per_threat
@per_maker
def test_one_image_is_enough(net: nn.Module, data: Data, make: Maker, threat: ThreatModel) -> None:
    images, labels = (tensor[1:2] for tensor in data)
    wide = replace(threat, eps=10 * threat.eps)
    assert make(wide, 64)(net, images, labels, wide, seed=0).fooled.tolist() == [True]


@per_maker
def test_a_model_that_is_always_wrong_is_returned_its_images(net: nn.Module, data: Data, make: Maker) -> None:
    images = data[0]
    labels = (predict(net, images).argmax(1) + 1) % 3
    result = make(THREATS[0], 64)(net, images, labels, THREATS[0], seed=0)
    assert result.fooled.all()
    assert torch.equal(result.adversarial, images)


@per_threat
@pytest.mark.parametrize(
    ("name", "classes"),
    [(name, classes) for name in MAKERS for classes in (2, 3, 4) if (name, classes) != ("dlr", 2)],
)
def test_few_classes(name: str, classes: int, threat: ThreatModel) -> None:
    make = MAKERS[name]
    weights = torch.randn(16, classes, generator=torch.Generator().manual_seed(2))
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))

    def model(batch: Tensor) -> Tensor:
        return (batch - 0.5).flatten(1) @ weights

    labels = predict(model, images).argmax(1)
    result = make(threat, 64)(model, images, labels, threat, seed=0)
    check_legal(result, model, images, labels, threat)
    assert result.fooled.any()


@per_maker
def test_data_that_does_not_fit_is_refused(net: Classifier, data: Data, make: Maker) -> None:
    images, labels = data
    attack = make(THREATS[0], 64)
    cases = [
        (images * 255, labels, None, "outside the box"),
        (images, labels + 1, None, "label out of range"),
        (images, labels[:-1], None, "do not fit the images"),
        (images, labels, torch.arange(3), "indices must number the images"),
    ]
    for bad_images, bad_labels, indices, message in cases:
        with pytest.raises(DataError, match=message):
            attack(net, bad_images, bad_labels, THREATS[0], seed=0, indices=indices)


@per_threat
def test_the_suite_is_no_weaker_than_its_parts(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    """Image by image, because a part's chance depends on seed and number, whoever else is attacked."""
    images, labels = data
    parts = short_suite(threat, 64)
    result = AutoAttack(parts)(net, images, labels, threat, seed=0)
    alone = [part(net, images, labels, threat, seed=0).correct for part in parts]
    assert torch.equal(result.correct, worst_case(alone))


@per_threat
def test_every_part_keeps_its_vector_and_sees_what_is_left(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, labels = data
    seen: list[int] = []

    class Counting:
        def __init__(self, part: Attack) -> None:
            self.part, self.name = part, part.name

        def __call__(
            self, model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int,
            indices: Tensor | None = None,
        ) -> AttackResult:  # fmt: skip
            assert indices is not None
            assert torch.equal(data[0][indices], images)
            seen.append(len(images))
            return self.part(model, images, labels, threat, seed=seed, indices=indices)

    suite = AutoAttack(tuple(Counting(part) for part in short_suite(threat, 64)))
    found = suite.run(net, images, labels, threat, seed=0)
    assert list(found.correct) == ["APGD-CE-5", "APGD-T-5", "FAB-T-5", "Square-40"]
    vectors = [accuracy_vector(net, images, labels), *found.correct.values()]
    assert all((after <= before).all() for before, after in pairwise(vectors))
    assert seen == [int(vector.sum()) for vector in vectors[:-1]]
    assert torch.equal(vectors[-1], found.whole.correct)


def test_later_parts_are_not_asked_when_nothing_is_left(net: nn.Module, data: Data) -> None:
    asked = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        logits: Tensor = net(images)
        return logits

    found = AutoAttack().run(counted, *data, ThreatModel("linf", 0.4), seed=0)
    assert not found.whole.correct.any()
    assert list(found.correct) == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    assert asked < 8 * 150


@pytest.mark.parametrize("norm", NORMS)
def test_the_standard_parameters(norm: Norm) -> None:
    threat = ThreatModel(norm, 0.1)
    ce, targeted, fab, square = standard(threat, batch_size=32)
    assert ce == APGD("cross_entropy", steps=100, restarts=1, batch_size=32)
    assert targeted == APGD("dlr", steps=100, restarts=1, targets=9, batch_size=32)
    assert fab == Within(FAB(norm, 0.1, steps=100, restarts=1, targets=9, batch_size=32))
    assert square == Square(queries=5000, share=0.8, batch_size=32)


def test_names() -> None:
    assert AutoAttack().name == "AutoAttack"
    assert AutoAttack((APGD(), Square())).name == "AutoAttack (APGD-CE, Square)"
    assert Within(FAB()).name == "FAB-T"
    assert [part.name for part in reference_parts()] == [
        f"{name} (pyautoattack)" for name in ("APGD-CE", "APGD-T", "FAB-T", "Square")
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [((), "a suite needs attacks .*got none"), ((PGD(), PGD(step=0.1)), "of different names .*PGD-20, PGD-20")],
)
def test_suites_that_make_no_sense_are_refused(parts: tuple[Attack, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AutoAttack(parts)


def test_a_batch_size_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size must be"):
        AutoAttack(batch_size=0)
    with pytest.raises(UsageError, match="batch_size must be"):
        ReferencePart("square", 0)
    with pytest.raises(UsageError, match=r"unknown attack .*apgd-ce, .*'apgd'"):
        ReferencePart("apgd")  # type: ignore[arg-type]


@per_threat
def test_within_counts_small_distortions_only(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, labels = data
    far = FAB(threat.norm, steps=5)
    free, kept = far(net, images, labels, seed=0), Within(far)(net, images, labels, threat, seed=0)
    move = (free.adversarial - images).flatten(1)
    distance = move.abs().amax(1) if threat.norm == "linf" else move.norm(dim=1)
    assert torch.equal(kept.fooled, free.fooled & (distance <= threat.eps + 1e-6))
    assert torch.equal(kept.adversarial[~kept.fooled], images[~kept.fooled])


def test_likely_classes_in_order() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 6.0, 7.0, 8.0]])
    assert likely_classes(logits, torch.tensor([0, 3]), 2).tolist() == [[2, 1], [2, 1]]
    assert likely_classes(logits, torch.tensor([0, 3]), 9).tolist() == [[2, 1, 3], [2, 1, 0]]


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_attacks_see_right_images_with_their_numbers(batch_size: int) -> None:
    images = torch.linspace(0, 1, 11).view(11, 1)

    def model(batch: Tensor) -> Tensor:
        return torch.cat([0.5 - batch, batch - 0.5], 1)

    labels = torch.ones(11, dtype=torch.long)
    seen: list[int] = []

    def attack(held: object) -> Tensor:
        numbers, clean = held.numbers, held.images  # type: ignore[attr-defined]
        seen.extend(numbers.tolist())
        assert len(numbers) <= 4 * batch_size
        assert torch.equal(clean.flatten(), (numbers.float() - 50) / 10)
        return torch.where(numbers[:, None] % 2 == 0, 0.0, clean)

    result = attack_right(model, images, labels, torch.arange(11) + 50, batch_size, attack)
    assert seen == [56, 57, 58, 59, 60]
    assert result.fooled.tolist() == [True] * 7 + [False, True, False, True]


def test_image_numbers() -> None:
    assert check_indices(None, 3).tolist() == [0, 1, 2]
    assert check_indices(torch.tensor([7, 5]), 2).tolist() == [7, 5]
    with pytest.raises(DataError, match="indices must number the images"):
        check_indices(torch.tensor([7, 5]), 3)


def test_the_reference_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, net: nn.Module, data: Data) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack.autoattack", None)
    with pytest.raises(UsageError, match=r"pyautoattack is not installed; run: pip install 'qopt\[autoattack\]'"):
        ReferencePart("apgd-ce")(net, *data, THREATS[0], seed=0)


@pytest.mark.parametrize("name", ["apgd-ce", "fab-t"])
@per_threat
def test_the_reference_as_an_attack(net: nn.Module, data: Data, name: PartName, threat: ThreatModel) -> None:
    pytest.importorskip("pyautoattack")
    images, labels = (tensor[:12] for tensor in data)
    state, trace = torch.random.get_rng_state(), sys.gettrace()
    with torch.inference_mode():
        result = ReferencePart(name)(net, images.clone(), labels.clone(), threat, seed=0)
    check_legal(result, net, images, labels, threat)
    assert result.fooled.any()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sys.gettrace() is trace
    assert all(p.grad is None for p in net.parameters())
    if name == "apgd-ce":
        again = ReferencePart(name)(net, images, labels, threat, seed=0)
        assert torch.equal(again.adversarial, result.adversarial)


def test_the_reference_in_a_suite(net: nn.Module, data: Data) -> None:
    pytest.importorskip("pyautoattack")
    images, labels = (tensor[:24] for tensor in data)
    suite = AutoAttack((ReferencePart("apgd-ce"), APGD(steps=20), ReferencePart("apgd-dlr")))
    found = suite.run(net, images, labels, THREATS[0], seed=0)
    check_legal(found.whole, net, images, labels, THREATS[0])
    assert list(found.correct) == ["APGD-CE (pyautoattack)", "APGD-CE-20", "APGD-DLR (pyautoattack)"]


def test_what_the_reference_cannot_attack(net: nn.Module, data: Data) -> None:
    pytest.importorskip("pyautoattack")
    with pytest.raises(UsageError, match=r"apgd-t of pyautoattack needs 4 classes .*got 3.*qopt's own"):
        ReferencePart("apgd-t")(net, *data, THREATS[0], seed=0)
    vectors = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"not images with channels .*\(3, 5\)"):
        ReferencePart("apgd-ce")(lambda x: x, vectors, torch.zeros(3, dtype=torch.long), THREATS[0], seed=0)
    zero = ReferencePart("apgd-ce")(net, *data, ThreatModel("linf", 0.0), seed=0)
    assert torch.equal(zero.adversarial, data[0])
    assert torch.equal(zero.correct, accuracy_vector(net, *data))
