from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import PGD, MinimumAttack, accuracy_vector, keep_within, predict
from qopt.attacks.cw import CW
from qopt.attacks.gradient import margin
from qopt.errors import DataError, ModelError, UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
FEW = CW(steps=40, search_steps=4)


def lengths(a: Tensor, b: Tensor) -> Tensor:
    squares: Tensor = (a - b).double().flatten(1).square().sum(1)
    return squares.sqrt()


def linear(count: int = 60, side: int = 5) -> tuple[Tensor, Tensor, nn.Module, Tensor]:
    """Images away from the box, their classes, a linear model of two classes, and how far each is from its border."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(side * side, generator=generator)
    images = 0.35 + 0.3 * torch.rand(count, 1, side, side, generator=generator)
    offset = (images.flatten(1) @ weights).median() + 0.05

    class Model(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            score = batch.flatten(1) @ weights - offset
            return torch.stack([-0.5 * score, 0.5 * score], 1)

    model = Model()
    logits = model(images)
    distance = (logits[:, 0] - logits[:, 1]).abs() / weights.norm()
    return images, logits.argmax(1), model, distance


def test_on_a_linear_model_it_finds_the_shortest_way_to_the_border() -> None:
    images, labels, model, distance = linear()
    result = CW()(model, images, labels, seed=0)
    assert result.fooled.all()
    found = lengths(result.adversarial, images)
    assert (found >= distance.double() - 1e-6).all()
    assert found.mean() / distance.mean() < 1.03
    assert (found / distance).median() < 1.02
    assert (found - distance).max() < 0.015  # a step of every pixel that overshoots, where the border is very near


@pytest.mark.parametrize("kappa", [0.05, 0.3])
def test_kappa_is_a_lead_and_costs_its_distance(kappa: float) -> None:
    images, labels, model, distance = linear()
    result = CW(kappa=kappa)(model, images, labels, seed=0)
    assert result.fooled.all()
    logits = predict(model, result.adversarial)
    assert (margin(logits, labels) >= kappa - 1e-6).all()
    lead = (predict(model, images)[:, 0] - predict(model, images)[:, 1]).abs()
    expected = distance * (lead + kappa) / lead
    assert (lengths(result.adversarial, images) / expected).mean().item() == pytest.approx(1.0, abs=0.05)


def test_results_are_legal_and_true(ste_net: nn.Module, data: Data) -> None:
    images, labels = data
    before = images.clone()
    attack: MinimumAttack = FEW
    result = attack(ste_net, images, labels, seed=0)
    assert result.adversarial.dtype == torch.float32
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(result.correct, accuracy_vector(ste_net, result.adversarial, labels))
    wrong = ~accuracy_vector(ste_net, images, labels)
    assert wrong.any()
    assert torch.equal(result.adversarial[wrong], images[wrong])
    assert result.fooled.double().mean() > 0.99
    assert torch.equal(images, before)


def test_it_is_nearer_than_pgd_at_its_radius(net: nn.Module, data: Data) -> None:
    """What CW fools within eps is at least what PGD-20 fools there, up to three images."""
    images, labels = data
    for eps in (0.3, 0.5, 0.8):
        threat = ThreatModel("l2", eps)
        within = keep_within(CW()(net, images, labels, seed=0), images, threat)
        assert within.fooled.sum() >= PGD()(net, images, labels, threat, seed=0).fooled.sum() - 3


@pytest.mark.parametrize("attack", [CW(), CW.low_bitwidth()], ids=["default", "low bitwidth"])
def test_black_and_white_pixels_can_be_attacked(net: nn.Module, data: Data, attack: CW) -> None:
    """With the paper's equal steps in w nothing moves: the slope at the walls is 0."""
    images = (data[0][:40] > 0.5).float()
    labels = predict(net, images).argmax(1)
    result = attack(net, images, labels, seed=0)
    assert result.fooled.all()
    grey = 0.5 + 0.5 * (images - 0.5)
    assert (lengths(result.adversarial, images) < lengths(grey, images)).all()


def test_black_and_white_pixels_take_no_more_steps_than_grey_ones(net: nn.Module, data: Data) -> None:
    """Steps as long at the walls as elsewhere: ten times the gradients come hardly nearer."""
    images = (data[0][:40] > 0.5).float()
    labels = predict(net, images).argmax(1)
    few, many = (attack(net, images, labels, seed=0) for attack in (CW(), CW(steps=500, search_steps=9)))
    assert lengths(few.adversarial, images).mean() < 1.03 * lengths(many.adversarial, images).mean()


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_changes_nothing(net: nn.Module, data: Data, shift: float) -> None:
    """torchattacks takes the largest of the logits times zero or one, and finds nothing at -100."""
    images, labels = data[0][:60], data[1][:60]
    plain = FEW(net, images, labels, seed=0)
    shifted = FEW(lambda batch: net(batch) + shift, images, labels, seed=0)
    assert torch.equal(plain.fooled, shifted.fooled)
    longer = lengths(shifted.adversarial, images).mean() / lengths(plain.adversarial, images).mean()
    assert longer.item() == pytest.approx(1.0, abs=0.02)


def test_batches_and_parts_change_nothing_but_rounding(net: nn.Module, data: Data) -> None:
    images, labels = data[0][:60], data[1][:60]
    whole = FEW(net, images, labels, seed=0)
    part = torch.arange(59, 10, -4)
    alone = FEW(net, images[part], labels[part], seed=0, indices=part)
    assert torch.equal(alone.fooled, whole.fooled[part])
    near = (lengths(alone.adversarial, images[part]) / lengths(whole.adversarial, images)[part] - 1).abs()
    assert near.nanmedian() < 1e-3
    other = replace(FEW, batch_size=7)(net, images, labels, seed=0)
    assert torch.equal(other.fooled, whole.fooled)
    assert (lengths(other.adversarial, images) - lengths(whole.adversarial, images)).abs().median() < 1e-3


def test_seeds_change_nothing(net: nn.Module, data: Data) -> None:
    images, labels = data[0][:30], data[1][:30]
    first, other = (FEW(net, images, labels, seed=seed).adversarial for seed in (0, 1))
    assert torch.equal(first, other)


def test_more_constants_and_steps_come_nearer(net: nn.Module, data: Data) -> None:
    images, labels = data[0][:60], data[1][:60]
    budgets = [CW(steps=20, search_steps=2), CW(steps=50, search_steps=4), CW(steps=200, search_steps=9)]
    means = []
    for attack in budgets:
        result = attack(net, images, labels, seed=0)
        assert result.fooled.double().mean() > 0.95
        means.append(float(lengths(result.adversarial, images)[result.fooled].mean()))
    assert means[0] > means[1] > means[2] - 1e-4


@pytest.mark.parametrize("constant", [1e-3, 1e3])
def test_the_search_recovers_from_a_bad_first_constant(net: nn.Module, data: Data, constant: float) -> None:
    images, labels = data[0][:60], data[1][:60]
    good = CW()(net, images, labels, seed=0)
    found = CW(constant=constant, search_steps=12)(net, images, labels, seed=0)
    assert torch.equal(found.fooled, good.fooled)
    assert lengths(found.adversarial, images).mean() < 1.05 * lengths(good.adversarial, images).mean()


def test_evaluations_are_saved_as_images_stall_and_leave(net: nn.Module, data: Data) -> None:
    images, labels = data
    asked = [0]
    largest = [0]

    def counted(batch: Tensor) -> Tensor:
        asked[0] += len(batch)
        largest[0] = max(largest[0], len(batch))
        logits: Tensor = net(batch)
        return logits

    CW(batch_size=32)(counted, images, labels, seed=0)
    assert asked[0] < 0.6 * 500 * len(images)
    assert largest[0] <= 32


def test_what_cannot_be_fooled_comes_back_and_is_given_up_soon() -> None:
    asked = [0]

    def constant(images: Tensor) -> Tensor:
        asked[0] += len(images)
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1) + 0 * images.flatten(1).sum(1, keepdim=True)

    images, labels = torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.long)
    result = CW()(constant, images, labels, seed=0)
    assert torch.equal(result.adversarial, images)
    assert not result.fooled.any()
    assert asked[0] < 6 * 5 * 40


def test_a_model_without_gradients_is_no_error() -> None:
    def model(images: Tensor) -> Tensor:
        total = images.detach().flatten(1).sum(1)
        return torch.stack([total, 2 - total], 1)

    images, labels = torch.full((3, 1, 2, 2), 0.6), torch.zeros(3, dtype=torch.long)
    result = CW()(model, images, labels, seed=0)
    assert torch.equal(result.adversarial, images)


def test_gradients_that_are_not_finite_do_not_stay_in_the_averages(net: nn.Module, data: Data) -> None:
    """NaN in one gradient would stay in Adam's averages; it counts as 0 and the search goes on."""
    calls = [0]

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, pixels: Tensor) -> Tensor:
            return pixels.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            calls[0] += 1
            return torch.full_like(gradient, torch.nan) if calls[0] % 3 == 1 else gradient

    def model(images: Tensor) -> Tensor:
        spoiled: Tensor = Spoiled.apply(images)  # type: ignore[no-untyped-call]
        logits: Tensor = net(spoiled)
        return logits

    images, labels = data[0][:30], data[1][:30]
    assert CW()(model, images, labels, seed=0).fooled.double().mean() > 0.95


def test_the_world_is_left_alone(net: nn.Module, data: Data) -> None:
    images, labels = data[0][:20], data[1][:20]
    expected = FEW(net, images, labels, seed=0)
    before = [p.detach().clone() for p in net.parameters()]
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        found = FEW(net, images.clone(), labels.clone(), seed=0)
    assert torch.equal(found.adversarial, expected.adversarial)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_images_all_wrong_and_one_image(net: nn.Module, data: Data) -> None:
    images = data[0][:10]
    labels = (predict(net, images).argmax(1) + 1) % 3
    result = FEW(net, images, labels, seed=0)
    assert torch.equal(result.adversarial, images)
    assert result.fooled.all()
    one = FEW(net, images[:1], predict(net, images[:1]).argmax(1), seed=0)
    assert one.fooled.all()


def test_presets_and_names() -> None:
    assert CW().name == "CW-L2 5x100"
    assert CW.low_bitwidth(5) == CW(steps=100, search_steps=10, constant=0.9, learning_rate=0.1, kappa=5)
    assert CW.low_bitwidth(5).name == "CW-L2 10x100 kappa 5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "CW: steps must be"),
        ({"search_steps": 0}, "search_steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"constant": 0.0}, "constant must be"),
        ({"learning_rate": float("inf")}, "learning_rate must be"),
        ({"kappa": -1.0}, "kappa must be"),
        ({"kappa": float("nan")}, "kappa must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CW(**options)  # type: ignore[arg-type]


def test_data_that_does_not_fit_is_refused(net: nn.Module, data: Data) -> None:
    images, labels = data
    with pytest.raises(DataError, match="outside the box"):
        FEW(net, 255 * images, labels, seed=0)
    with pytest.raises(DataError, match="label out of range"):
        FEW(net, images, labels + 1, seed=0)
    with pytest.raises(DataError, match="indices must number"):
        FEW(net, images, labels, seed=0, indices=torch.arange(3))
    with pytest.raises(ModelError, match="not finite"):
        FEW(lambda batch: torch.full((len(batch), 3), torch.nan), images, labels, seed=0)
