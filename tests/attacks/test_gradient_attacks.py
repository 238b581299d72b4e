"""What must hold of every attack by gradients, on every network and in every norm."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import FGSM, PGD, Attack, AttackResult, Classifier, accuracy_vector, predict
from qopt.attacks.bim import BIM
from qopt.attacks.mim import MIM
from qopt.attacks.rfgsm import RFGSM
from qopt.errors import DataError, ModelError, UsageError
from qopt.threat import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)
THREATS = [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)]
ATTACKS: list[Attack] = [
    FGSM(),
    FGSM(loss="margin", batch_size=7),
    PGD(steps=5),
    PGD(steps=5, restarts=2, batch_size=64),
    PGD(steps=5, loss="margin", compact=False),
    PGD(steps=5, step=0.1, random_start=False),
    PGD(steps=5, loss="dlr"),
    RFGSM(),
    BIM(steps=5),
    MIM(steps=5),
    MIM(steps=5, decay=0.5, loss="dlr", compact=False),
]
Data = tuple[Tensor, Tensor]
per_attack = pytest.mark.parametrize("attack", ATTACKS, ids=repr)
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


def accuracy(result: AttackResult) -> float:
    return float(result.correct.double().mean())


def distances(result: AttackResult, images: Tensor, norm: Norm) -> Tensor:
    move = (result.adversarial - images).double().flatten(1)
    return move.abs().amax(1) if norm == "linf" else move.norm(dim=1)


@per_threat
@per_attack
def test_results_are_legal_and_true(ste_net: nn.Module, data: Data, attack: Attack, threat: ThreatModel) -> None:
    images, labels = data
    before = images.clone()
    result = attack(ste_net, images, labels, threat, seed=0)
    assert result.adversarial.shape == images.shape
    assert result.adversarial.dtype == torch.float32
    assert (distances(result, images, threat.norm) <= threat.eps + 1e-6).all()
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(result.correct, accuracy_vector(ste_net, result.adversarial, labels))
    wrong_before = ~accuracy_vector(ste_net, images, labels)
    assert wrong_before.any()
    assert torch.equal(result.adversarial[wrong_before], images[wrong_before])
    assert result.fooled[wrong_before].all()
    assert accuracy(result) < float((~wrong_before).double().mean()) - 0.1
    assert torch.equal(images, before)


@pytest.mark.parametrize("norm", NORMS)
@per_attack
def test_eps_zero_is_clean_accuracy(net: nn.Module, data: Data, attack: Attack, norm: Norm) -> None:
    images, labels = data
    result = attack(net, images, labels, ThreatModel(norm, 0.0), seed=0)
    assert torch.equal(result.adversarial, images)
    assert torch.equal(result.correct, accuracy_vector(net, images, labels))


@per_threat
@per_attack
def test_batches_and_parts_change_nothing(net: nn.Module, data: Data, attack: Attack, threat: ThreatModel) -> None:
    images, labels = data
    whole = attack(net, images, labels, threat, seed=0)
    part = torch.arange(149, 40, -3)
    alone = attack(net, images[part], labels[part], threat, seed=0, indices=part)
    assert torch.equal(alone.fooled, whole.fooled[part])
    assert isinstance(attack, FGSM | PGD | RFGSM | BIM | MIM)
    for batch_size in (1, 13, 1000):
        other = replace(attack, batch_size=batch_size)(net, images, labels, threat, seed=0)
        assert torch.equal(other.fooled, whole.fooled)
        assert (other.adversarial - whole.adversarial).abs().flatten(1).amax(1).median() < 1e-5


@per_threat
def test_one_seed_one_result(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, labels = data
    first, again, other = (PGD(steps=3)(net, images, labels, threat, seed=s).adversarial for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@per_threat
@pytest.mark.parametrize("options", [PGD(), PGD(loss="margin"), PGD(restarts=3, steps=7), BIM(), MIM()], ids=repr)
def test_compaction_changes_no_accuracy(
    net: nn.Module, data: Data, options: PGD | BIM | MIM, threat: ThreatModel
) -> None:
    images, labels = data
    short = options(net, images, labels, threat, seed=0)
    full = replace(options, compact=False)(net, images, labels, threat, seed=0)
    assert torch.equal(short.fooled, full.fooled)
    assert torch.allclose(short.adversarial[short.correct], full.adversarial[short.correct], atol=1e-5)
    attacked = short.fooled & accuracy_vector(net, images, labels)
    assert distances(full, images, "l2")[attacked].mean() > distances(short, images, "l2")[attacked].mean()


def test_images_that_are_left_share_batches(net: nn.Module, data: Data) -> None:
    """Without that, 150 images in batches of 10 would keep 15 batches going to the last step."""
    sizes: list[int] = []

    def counted(batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(batch))
        logits: Tensor = net(batch)
        return logits

    result = PGD(batch_size=10)(counted, *data, ThreatModel("linf", 0.06), seed=0)
    assert 10 < int(result.correct.sum()) < 100
    assert max(sizes) == 10
    full = sum(sizes) // 10
    assert len(sizes) <= full + 2 * PGD().steps  # two groups of images: a batch of each and step may be part-filled


def test_no_image_goes_back_that_need_not(net: nn.Module, data: Data) -> None:
    """Where most of a batch is fooled, gradients are taken of the rest only."""
    images, labels = data
    backward = [0]

    def counted(batch: Tensor) -> Tensor:
        logits: Tensor = net(batch)
        if logits.requires_grad:
            logits.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: backward.__setitem__(0, backward[0] + len(gradient))
            )
        return logits

    right = int(accuracy_vector(net, images, labels).sum())
    result = PGD(steps=2, step=0.15, batch_size=150)(counted, images, labels, ThreatModel("linf", 0.15), seed=0)
    assert result.correct.double().mean() < 0.2
    assert right <= backward[0] < 1.4 * right


def test_compaction_saves_evaluations(net: nn.Module, data: Data) -> None:
    images, labels = data
    evaluations = {True: 0, False: 0}
    for compact in evaluations:

        def counted(batch: Tensor, compact: bool = compact) -> Tensor:
            evaluations[compact] += len(batch)
            logits: Tensor = net(batch)
            return logits

        PGD(compact=compact)(counted, images, labels, ThreatModel("linf", 0.08), seed=0)
    assert evaluations[True] < evaluations[False] / 2.5  # of which half go no further than the logits


@per_threat
@pytest.mark.parametrize("compact", [True, False])
def test_restarts_only_take_away(net: nn.Module, data: Data, threat: ThreatModel, compact: bool) -> None:
    images, labels = data
    correct = [
        PGD(steps=2, restarts=restarts, compact=compact)(net, images, labels, threat, seed=0).correct
        for restarts in (1, 2, 5)
    ]
    assert (correct[1] <= correct[0]).all()
    assert (correct[2] <= correct[1]).all()


@per_threat
def test_pgd_is_no_weaker_than_fgsm(net: nn.Module, ste_net: nn.Module, data: Data, threat: ThreatModel) -> None:
    for model in (net, ste_net):
        weak, strong = (attack(model, *data, threat, seed=0) for attack in (FGSM(), PGD()))
        assert accuracy(strong) <= accuracy(weak) + 0.01


@per_threat
def test_a_larger_ball_is_no_safer(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    accuracies = [
        accuracy(PGD()(net, *data, replace(threat, eps=factor * threat.eps), seed=0)) for factor in (0.25, 0.5, 1, 2, 4)
    ]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[-1]


@per_threat
@per_attack
@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_changes_nothing(
    net: nn.Module, data: Data, attack: Attack, threat: ThreatModel, shift: float
) -> None:
    plain = attack(net, *data, threat, seed=0)
    shifted = attack(lambda images: net(images) + shift, *data, threat, seed=0)
    assert abs(int(plain.fooled.sum()) - int(shifted.fooled.sum())) <= 1


@per_threat
def test_black_and_white_pixels_can_be_attacked(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images = (data[0] > 0.5).float()
    labels = predict(net, images).argmax(1)
    wide = replace(threat, eps=4 * threat.eps)
    for attack in (FGSM(), PGD()):
        result = attack(net, images, labels, wide, seed=0)
        assert accuracy(result) < 0.7
        assert (distances(result, images, wide.norm)[result.correct] > 0.5 * wide.eps).all()


@per_attack
def test_parameters_are_left_alone(net: nn.Module, data: Data, attack: Attack) -> None:
    before = [p.detach().clone() for p in net.parameters()]
    assert all(p.requires_grad for p in net.parameters())
    state = torch.random.get_rng_state()
    attack(net, *data, THREATS[0], seed=0)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


@per_threat
def test_a_model_that_is_always_wrong_is_returned_its_images(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, _ = data
    labels = (predict(net, images).argmax(1) + 1) % 3
    result = PGD()(net, images, labels, threat, seed=0)
    assert result.fooled.all()
    assert torch.equal(result.adversarial, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be .*got 0"),
        ({"restarts": 0}, "restarts must be .*got 0"),
        ({"batch_size": 0}, "batch_size must be .*got 0"),
        ({"step": 0.0}, "step must be"),
        ({"step": float("nan")}, "step must be"),
        ({"loss": "hinge"}, "unknown loss .*cross_entropy or margin.*'hinge'"),
        ({"restarts": 2, "random_start": False}, "restarts from the clean image"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PGD(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (FGSM(), "FGSM"),
        (FGSM(loss="margin"), "FGSM margin"),
        (PGD(), "PGD-20"),
        (PGD(steps=50, restarts=5, loss="margin"), "PGD-50x5 margin"),
        (RFGSM(), "R+FGSM"),
        (RFGSM(loss="dlr"), "R+FGSM dlr"),
        (BIM(), "BIM-20"),
        (BIM(steps=100, loss="margin"), "BIM-100 margin"),
        (MIM(steps=10), "MIM-10"),
        (MIM(loss="dlr"), "MIM-20 dlr"),
    ],
)
def test_names(attack: Attack, name: str) -> None:
    assert attack.name == name


def spoiled(images: Tensor) -> Tensor:
    """Right, and finite, on the clean images only."""
    total = images.flatten(1).sum(1)
    return torch.stack([total, torch.where(total == 2.0, total / 2, torch.nan)], 1)


@pytest.mark.parametrize("attack", [FGSM(), PGD()], ids=repr)
def test_a_logit_that_is_not_finite_under_attack_is_an_error(attack: Attack) -> None:
    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"image 0: .*not finite"):
        attack(spoiled, images, labels, ThreatModel("linf", 0.1), seed=0)


@pytest.mark.parametrize("attack", [FGSM(), PGD()], ids=repr)
def test_data_that_does_not_fit_is_refused(net: Classifier, data: Data, attack: Attack) -> None:
    images, labels = data
    cases = [
        (images * 255, labels, None, "outside the box"),
        (images, labels + 1, None, "label out of range"),
        (images, labels[:-1], None, "do not fit the images"),
        (images, labels, torch.arange(3), "indices must number the images"),
    ]
    for bad_images, bad_labels, indices, message in cases:
        with pytest.raises(DataError, match=message):
            attack(net, bad_images, bad_labels, THREATS[0], seed=0, indices=indices)
