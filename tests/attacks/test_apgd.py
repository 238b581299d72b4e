"""Auto-PGD against Algorithm 1 written as a plain loop, against linear optima, and at its edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qopt.attacks import PGD, AttackResult, Classifier, accuracy_vector, predict
from qopt.attacks.apgd import APGD, ApgdLoss, _halve, _State, checkpoints, targeted_dlr
from qopt.attacks.ball import direction, project, random_start
from qopt.attacks.gradient import LOSSES, input_gradient
from qopt.errors import ModelError, UsageError
from qopt.threat import ThreatModel

THREATS = [ThreatModel("linf", 0.03), ThreatModel("l2", 0.2)]
Data = tuple[Tensor, Tensor]
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


def fooled(result: AttackResult) -> int:
    return int(result.fooled.sum())


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),  # the checkpoints printed in the paper
        (50, [11, 21, 30, 38, 45]),
        (20, [4, 7, 9, *range(10, 21)]),
        (3, [1, 2, 3]),
        (1, [1]),
    ],
)
def test_checkpoints(steps: int, expected: list[int]) -> None:
    found = checkpoints(steps)
    assert list(found)[: len(expected)] == expected
    assert [sum(list(found.values())[: i + 1]) for i in range(len(found))] == list(found)
    assert max(found) <= steps


@given(steps=st.integers(1, 400))
@settings(max_examples=60)
def test_checkpoints_never_come_later_apart(steps: int) -> None:
    gaps = list(checkpoints(steps).values())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] >= 1
    assert steps - max(checkpoints(steps)) < max(int(0.06 * steps), 1) + int(0.22 * steps)


def algorithm_1(
    model: Classifier, clean: Tensor, label: Tensor, start: Tensor, threat: ThreatModel, steps: int, loss: ApgdLoss
) -> tuple[Tensor, bool]:
    """One image (1, ...): Algorithm 1 with its history kept in lists; the point returned, and whether it fooled."""

    def value(point: Tensor) -> float:
        with torch.no_grad():
            return float(LOSSES[loss](model(point).double(), label))

    def wrong(point: Tensor) -> bool:
        with torch.no_grad():
            return int(model(point).argmax()) != int(label)

    step, points, values = 2 * threat.eps, [start], [value(start)]
    if wrong(start):
        return start, True
    top, top_value, checks = start, values[0], [0]
    halved, tops_at_checks = [True], [values[0]]
    interval = max(int(0.22 * steps), 1)
    current = start
    for k in range(steps):
        gradient = input_gradient(model, current, label, loss)
        z = project(current + step * direction(gradient, current, threat.norm), clean, threat)
        following = (
            z if k == 0 else project(current + 0.75 * (z - current) + 0.25 * (current - points[-2]), clean, threat)
        )
        points.append(following)
        values.append(value(following))
        if wrong(following):
            return following, True
        if values[-1] > top_value:
            top, top_value = following, values[-1]
        current = following
        if k + 1 == checks[-1] + interval:
            window = range(checks[-1], k + 1)
            first = sum(values[i + 1] > values[i] for i in window) <= 0.75 * len(window)
            second = not halved[-1] and tops_at_checks[-1] == top_value
            checks.append(k + 1)
            halved.append(first or second)
            tops_at_checks.append(top_value)
            if halved[-1]:
                step, current = step / 2, top
                points[-1] = top
            interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return top, False


@per_threat
@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
def test_runs_follow_algorithm_1(net: nn.Module, data: Data, threat: ThreatModel, loss: ApgdLoss) -> None:
    images, labels = (tensor[:30] for tensor in data)
    right = accuracy_vector(net, images, labels).nonzero().flatten()
    start = random_start(images, threat, seed=3, indices=torch.arange(30), restart=0)
    result = APGD(loss, steps=25)(net, images, labels, threat, seed=3)
    same = 0
    for row in right.tolist():
        one = slice(row, row + 1)
        point, success = algorithm_1(net, images[one], labels[one], start[one], threat, 25, loss)
        assert success == bool(result.fooled[row])
        same += bool((point - result.adversarial[one]).abs().max() < 1e-4)
    assert same >= len(right) - 2  # a comparison of two losses may fall the other way in another batch's rounding


@pytest.mark.parametrize(
    ("rises", "halved_before", "best_at_check", "best", "halves"),
    [
        (8, False, 1.0, 2.0, False),  # 8 of 10 steps rose, and the best point is new
        (7, False, 1.0, 2.0, True),  # at most three quarters rose: it swings
        (8, False, 2.0, 2.0, True),  # it rises, below an old best point
        (8, True, 2.0, 2.0, False),  # the same, but the step was halved a check ago
        (0, True, 2.0, 2.0, True),
    ],
)
def test_when_steps_are_halved(
    rises: int, halved_before: bool, best_at_check: float, best: float, halves: bool
) -> None:
    """The two conditions of section 3.1, on an image that stands at 0.3 with its best point at 0.7."""
    row, image = torch.zeros(1, dtype=torch.long), torch.full((1, 1, 1, 1), 0.3)
    top, value = torch.full((1, 1, 1, 1), 0.7), torch.ones(1)
    state = _State(
        rows=row, clean=image, labels=row, targets=row, step=torch.full((1, 1, 1, 1), 0.2), previous=image.clone(),
        images=image.clone(), gradient=image.clone(), loss=value, best_images=top, best_gradient=2 * top,
        best_loss=best * value, checked_loss=best_at_check * value, rises=row + rises,
        halved=torch.tensor([halved_before]),
    )  # fmt: skip
    _halve(state, 10)
    assert state.halved.tolist() == [halves]
    assert state.step.item() == pytest.approx(0.1 if halves else 0.2)
    assert state.images.item() == pytest.approx(0.7 if halves else 0.3)
    assert state.gradient.item() == pytest.approx(1.4 if halves else 0.3)
    assert (state.rises.item(), state.checked_loss.item()) == (0, best)


def test_the_halving_matters(net: nn.Module, data: Data) -> None:
    """The point of the schedule: with steps of 2 eps throughout, as a planted bug would take, the loss ends lower."""
    images, labels = data
    threat = ThreatModel("linf", 0.015)
    ours = APGD(steps=50)(net, images, labels, threat, seed=0)
    stuck = PGD(steps=50, step=2 * threat.eps)(net, images, labels, threat, seed=0)
    left = ours.correct & stuck.correct
    assert left.sum() > 50
    reached, swinging = (
        LOSSES["cross_entropy"](predict(net, r.adversarial[left]), labels[left]) for r in (ours, stuck)
    )
    assert reached.mean() > swinging.mean()
    assert (reached > swinging - 1e-4).double().mean() > 0.9


@per_threat
@pytest.mark.parametrize("attack", [APGD(steps=30), APGD("dlr", steps=30), APGD("dlr", steps=30, targets=2)], ids=repr)
def test_no_weaker_than_pgd(net: nn.Module, data: Data, threat: ThreatModel, attack: APGD) -> None:
    weak = PGD(steps=30)(net, *data, threat, seed=0)
    assert fooled(attack(net, *data, threat, seed=0)) >= fooled(weak) - 1


@per_threat
def test_restarts_only_take_away(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    results = [APGD(steps=2, restarts=restarts)(net, *data, threat, seed=0) for restarts in (1, 2, 4)]
    assert (results[1].correct <= results[0].correct).all()
    assert (results[2].correct <= results[1].correct).all()
    assert not torch.equal(results[2].adversarial, results[0].adversarial)


@per_threat
def test_more_targets_only_take_away(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    one, two, many = (APGD("dlr", steps=5, targets=targets)(net, *data, threat, seed=0) for targets in (1, 2, 99))
    assert (two.correct <= one.correct).all()
    assert torch.equal(two.adversarial, many.adversarial)


def test_the_first_target_is_the_most_likely_other_class() -> None:
    """Only the way to the class that is least likely at the clean image is open: the second target takes it."""

    def model(images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1)
        return torch.stack([torch.ones_like(mean), 0.5 - 0.01 * mean, 4 * mean - 1.0], 1)

    images, labels = torch.full((3, 1, 8, 8), 0.3), torch.zeros(3, dtype=torch.long)
    threat = ThreatModel("linf", 0.21)
    assert predict(model, images).argsort(1, descending=True)[0].tolist() == [0, 1, 2]
    assert not APGD("dlr", steps=5, targets=1)(model, images, labels, threat, seed=0).fooled.any()
    assert APGD("dlr", steps=5, targets=2)(model, images, labels, threat, seed=0).fooled.all()


def test_fooled_images_leave_at_once(net: nn.Module, data: Data) -> None:
    asked = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        logits: Tensor = net(images)
        return logits

    result = APGD()(counted, *data, ThreatModel("linf", 0.3), seed=0)
    assert result.fooled.all()
    assert asked < 5 * 150
    asked = 0
    APGD("dlr", targets=2)(counted, *data, ThreatModel("linf", 0.3), seed=0)
    assert asked < 10 * 150


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_budget_is_kept(net: nn.Module, data: Data, steps: int) -> None:
    asked = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        logits: Tensor = net(images)
        return logits

    threat = ThreatModel("linf", 1e-5)
    APGD(steps=steps, restarts=2)(counted, *data, threat, seed=0)
    right = int(accuracy_vector(net, *data).sum())
    assert asked == 2 * 150 + 2 * right * (steps + 1)


@pytest.mark.parametrize("classes", [4, 5, 10])
def test_targeted_dlr_against_a_loop(classes: int) -> None:
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(1)).double()
    labels, targets = torch.arange(40) % classes, (torch.arange(40) + 1) % classes
    found = targeted_dlr(logits, labels, targets)
    for row in range(40):
        z = logits[row].tolist()
        first, _, third, fourth, *_ = sorted(z, reverse=True)
        expected = -(z[int(labels[row])] - z[int(targets[row])]) / (first - (third + fourth) / 2)
        assert float(found[row]) == pytest.approx(expected, rel=1e-9)


def test_targeted_dlr_of_few_classes() -> None:
    three = torch.tensor([[3.0, 2.0, -1.0]]).double()
    assert targeted_dlr(three, torch.tensor([0]), torch.tensor([2])).tolist() == pytest.approx([-1.0])
    assert targeted_dlr(three[:, :2], torch.tensor([0]), torch.tensor([1])).tolist() == [-1.0]


@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
@settings(max_examples=40)
def test_targeted_dlr_is_blind_to_shift_and_scale(seed: int, shift: float, scale: float) -> None:
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)).double()
    labels, targets = torch.arange(6), (torch.arange(6) + 3) % 7
    plain, moved = (targeted_dlr(z, labels, targets) for z in (logits, scale * logits + shift))
    assert torch.allclose(plain, moved, rtol=1e-6, atol=1e-6)


def linear(weights: Tensor, offset: Tensor) -> Classifier:
    return lambda images: images.flatten(1) @ weights + offset


@per_threat
@pytest.mark.parametrize("attack", [APGD(steps=20), APGD("dlr", steps=20, targets=9)], ids=repr)
def test_two_classes_reach_the_linear_optimum(attack: APGD, threat: ThreatModel) -> None:
    threat = replace(threat, eps=0.3 * threat.eps)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(25, 2, generator=generator)
    images = 0.4 + 0.2 * torch.rand(100, 1, 5, 5, generator=generator)
    model = linear(weights, -(images.flatten(1) @ weights).mean(0))
    logits = predict(model, images)
    labels, gap = logits.argmax(1), (logits[:, 0] - logits[:, 1]).abs()
    normal = weights[:, 0] - weights[:, 1]
    reach = threat.eps * float(normal.abs().sum() if threat.norm == "linf" else normal.norm())
    result = attack(model, images, labels, threat, seed=0)
    assert 0.1 < result.fooled.double().mean() < 0.9
    assert torch.equal(result.fooled[(gap - reach).abs() > 1e-3], (gap < reach)[(gap - reach).abs() > 1e-3])


def test_untargeted_dlr_needs_three_classes() -> None:
    images, labels = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.long)
    model = linear(torch.eye(4)[:, :2], torch.tensor([0.1, 0.0]))
    with pytest.raises(UsageError, match="dlr needs three classes"):
        APGD("dlr", steps=2)(model, images, labels, ThreatModel("linf", 0.1), seed=0)


def test_saturated_cross_entropy_is_attacked_all_the_same(net: nn.Module, data: Data) -> None:
    """Float32 cross-entropy of logits times 1000 is 0 almost everywhere: nothing to compare and no gradient."""

    def confident(images: Tensor) -> Tensor:
        logits: Tensor = 1000 * net(images)
        return logits

    threat = ThreatModel("linf", 0.03)
    plain, scaled = (APGD(steps=20)(model, *data, threat, seed=0) for model in (net, confident))
    assert abs(fooled(plain) - fooled(scaled)) <= 2


def test_constant_models_are_not_asked_again() -> None:
    asked = 0

    def constant(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        return torch.tensor([[1.0, 0.0, 0.5]]).repeat(len(images), 1)

    for attack, most in ((APGD(), 4), (APGD("dlr", targets=2), 6)):
        asked = 0
        images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        result = attack(constant, images, torch.zeros(10, dtype=torch.long), ThreatModel(), seed=0)
        assert not result.fooled.any()
        assert asked <= 10 * most


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, pixels: Tensor) -> Tensor:
        return pixels.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[:, 0] = torch.nan
        return spoiled


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.5), ThreatModel("l2", 0.9)], ids=str)
@pytest.mark.parametrize("targets", [0, 1])
def test_what_is_not_finite_is_left_out_of_the_step(threat: ThreatModel, targets: int) -> None:
    def model(images: Tensor) -> Tensor:
        total: Tensor = NanGradient.apply(images.flatten(1)).sum(1)  # type: ignore[no-untyped-call]
        return torch.stack([total, 3 - total, -5 - total], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.6), torch.zeros(3, dtype=torch.long)
    result = APGD("dlr" if targets else "cross_entropy", steps=20, targets=targets)(
        model, images, labels, threat, seed=0
    )
    assert result.fooled.all()
    assert result.adversarial.isfinite().all()


def test_a_logit_that_is_not_finite_under_attack_is_an_error() -> None:
    def spoiled(images: Tensor) -> Tensor:
        total = images.flatten(1).sum(1)
        return torch.stack([total, torch.where(total == 2.0, total / 2, torch.nan)], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"image 0: .*not finite"):
        APGD(steps=3)(spoiled, images, labels, ThreatModel("linf", 0.1), seed=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attack", [APGD(steps=3), APGD("dlr", steps=3, targets=2)], ids=repr)
def test_gradients_flow_whatever_mode_the_caller_is_in(
    net: nn.Module, data: Data, attack: APGD, mode: type[torch.no_grad] | type[torch.inference_mode]
) -> None:
    expected = attack(net, *data, THREATS[0], seed=0)
    with mode():
        found = attack(net, data[0].clone(), data[1].clone(), THREATS[0], seed=0)
    assert torch.equal(found.adversarial, expected.adversarial)


def test_survivors_come_back_where_the_loss_was_highest(net: nn.Module, data: Data) -> None:
    """Good for transfers, and the reason that more steps never end lower."""
    images, labels = data
    threat = ThreatModel("linf", 0.01)
    short, long = (APGD(steps=steps)(net, images, labels, threat, seed=0) for steps in (2, 30))
    left = short.correct & long.correct
    losses = [LOSSES["cross_entropy"](predict(net, r.adversarial[left]), labels[left]) for r in (short, long)]
    assert (losses[1] >= losses[0] - 1e-3).double().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be .*1 or larger.*got 0"),
        ({"restarts": 0}, "restarts must be"),
        ({"targets": -1}, "targets must be .*0 or larger"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"loss": "margin"}, "unknown loss .*cross_entropy or dlr.*'margin'"),
        ({"targets": 9}, "only dlr takes targets .*loss='dlr'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        APGD(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (APGD(), "APGD-CE"),
        (APGD("dlr"), "APGD-DLR"),
        (APGD("dlr", targets=9), "APGD-T"),
        (APGD(steps=50), "APGD-CE-50"),
        (APGD("dlr", restarts=5), "APGD-DLR-100x5"),
    ],
)
def test_names(attack: APGD, name: str) -> None:
    assert attack.name == name
    assert replace(attack, batch_size=7).name == name
