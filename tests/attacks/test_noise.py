from __future__ import annotations

from math import sqrt
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import FGSM, Attack, MinimumAttack, accuracy_vector, keep_within, predict
from qopt.attacks.noise import GaussianNoise, UniformNoise
from qopt.errors import DataError, ModelError, UsageError
from qopt.threat import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)
Data = tuple[Tensor, Tensor]


def never_right(images: Tensor) -> Tensor:
    """Class 1 for any image that is not one flat grey: every draw fools, so every draw comes back."""
    flat = images.flatten(1)
    return torch.stack([torch.full_like(flat[:, 0], 1e-9), (flat.amax(1) - flat.amin(1))], 1)


def grey(count: int) -> Data:
    return torch.full((count, 1, 4, 4), 0.5), torch.zeros(count, dtype=torch.long)


def test_both_are_what_the_protocols_say() -> None:
    uniform: Attack = UniformNoise()
    gaussian: MinimumAttack = GaussianNoise()
    assert uniform.name == "uniform noise"
    assert gaussian.name == "Gaussian noise 0.0314"
    assert GaussianNoise(0.3).name == "Gaussian noise 0.3"


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_noise_fills_the_ball(norm: Norm) -> None:
    images, labels = grey(400)
    eps = 0.1
    result = UniformNoise()(never_right, images, labels, ThreatModel(norm, eps), seed=0)
    move = (result.adversarial - images).flatten(1)
    if norm == "linf":
        assert move.abs().max() <= eps + 1e-6
        assert move.std().item() == pytest.approx(eps / sqrt(3), rel=0.05)
    else:
        radii = move.norm(dim=1) / eps
        assert radii.max() <= 1 + 1e-5
        # Of a 16-dimensional ball the share r**16 lies within r.
        assert (radii**16).mean().item() == pytest.approx(0.5, abs=0.05)
    assert result.fooled.all()


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_gaussian_noise_has_its_standard_deviation_per_pixel(sigma: float) -> None:
    images, labels = grey(600)
    move = GaussianNoise(sigma)(never_right, images, labels, seed=0).adversarial - images
    assert move.std().item() == pytest.approx(sigma, rel=0.03)
    assert move.mean().item() == pytest.approx(0.0, abs=sigma / 20)
    assert move.flatten(1).abs().amax(1).mean() > 1.5 * sigma  # it leaves the linf ball of radius sigma


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_results_are_legal_and_true(net: nn.Module, data: Data, norm: Norm) -> None:
    images, labels = data
    threat = ThreatModel(norm, 0.2 if norm == "linf" else 2.0)
    result = UniformNoise(batch_size=40)(net, images, labels, threat, seed=0)
    assert torch.equal(result.correct, accuracy_vector(net, result.adversarial, labels, 40))
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(keep_within(result, images, threat).fooled, result.fooled)
    wrong = ~accuracy_vector(net, images, labels)
    assert torch.equal(result.adversarial[wrong], images[wrong])
    assert (result.adversarial != images).flatten(1).any(1)[~wrong].all()


def test_gaussian_returns_what_fooled_and_nothing_else(net: nn.Module, data: Data) -> None:
    images, labels = data
    result = GaussianNoise(0.3)(net, images, labels, seed=0)
    assert torch.equal(result.correct, accuracy_vector(net, result.adversarial, labels))
    right = accuracy_vector(net, images, labels)
    moved = (result.adversarial != images).flatten(1).any(1)
    assert torch.equal(moved, result.fooled & right)
    assert 0 < int(moved.sum()) < int(right.sum())
    assert result.fooled[~right].all()


def test_gaussian_is_what_numbers_drawn_by_hand_give(net: nn.Module, data: Data) -> None:
    """Accuracy under noise, counted on the noisy images themselves; all started right."""
    images = data[0]
    labels = predict(net, images).argmax(1)
    numbers = torch.arange(len(images)) + 5
    result = GaussianNoise(0.25)(net, images, labels, seed=9, indices=numbers)
    everything = GaussianNoise(0.25)(never_right, torch.full_like(images, 0.5), 0 * labels, seed=9, indices=numbers)
    noise = everything.adversarial - 0.5
    inside = noise.abs() < 0.5  # elsewhere the grey image was clipped, and its noise is not known in full
    assert torch.allclose(
        result.adversarial[result.fooled][inside[result.fooled]],
        (images + noise).clamp(0, 1)[result.fooled][inside[result.fooled]],
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_depends_on_seed_and_number_only(net: nn.Module, data: Data, kind: str) -> None:
    images, labels = data
    threat = ThreatModel("linf", 0.3)

    def attack(rows: Tensor, seed: int, batch_size: int, numbers: Tensor | None = None) -> Tensor:
        numbers = rows if numbers is None else numbers
        if kind == "uniform":
            return UniformNoise(batch_size)(
                net, images[rows], labels[rows], threat, seed=seed, indices=numbers
            ).adversarial
        return GaussianNoise(0.3, batch_size)(net, images[rows], labels[rows], seed=seed, indices=numbers).adversarial

    everything, part = torch.arange(150), torch.arange(149, 3, -7)
    whole = attack(everything, 1, 64)
    assert torch.equal(attack(part, 1, 64), whole[part])
    assert torch.equal(attack(everything, 1, 7), whole)
    assert not torch.equal(attack(everything, 2, 64), whole)
    assert not torch.equal(attack(everything, 1, 64, everything + 1), whole)


def test_uniform_noise_is_not_the_start_of_pgd(net: nn.Module, data: Data) -> None:
    """The two are to be independent draws: a suite that has both is not to try one point twice."""
    from qopt.attacks.ball import random_start

    images, labels = data
    threat = ThreatModel("linf", 0.2)
    noisy = UniformNoise()(net, images, labels, threat, seed=4).adversarial
    starts = random_start(images, threat, seed=4, indices=torch.arange(len(images)), restart=0)
    assert (noisy != starts).flatten(1).any(1).all()


def test_noise_is_weaker_than_gradients(net: nn.Module, data: Data) -> None:
    threat = ThreatModel("linf", 0.08)
    noise, gradients = (attack(net, *data, threat, seed=0) for attack in (UniformNoise(), FGSM()))
    assert noise.correct.double().mean() > gradients.correct.double().mean() + 0.2


@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_is_clean_accuracy(net: nn.Module, data: Data, norm: Norm) -> None:
    images, labels = data
    result = UniformNoise()(net, images, labels, ThreatModel(norm, 0.0), seed=0)
    assert torch.equal(result.adversarial, images)
    assert torch.equal(result.correct, accuracy_vector(net, images, labels))


def test_noise_asks_for_no_gradient(data: Data) -> None:
    def model(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        mean = images.flatten(1).mean(1)
        return torch.stack([mean, 1 - mean, 0 * mean], 1)

    UniformNoise()(model, *data, ThreatModel("linf", 0.1), seed=0)
    GaussianNoise()(model, *data, seed=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianNoise(0.0), "sigma must be"),
        (lambda: GaussianNoise(float("inf")), "sigma must be"),
        (lambda: GaussianNoise(batch_size=0), "batch_size must be"),
        (lambda: UniformNoise(batch_size=0), "batch_size must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(UsageError, match=message):
        build()


def test_data_that_does_not_fit_is_refused(net: nn.Module, data: Data) -> None:
    images, labels = data
    with pytest.raises(DataError, match="label out of range"):
        GaussianNoise()(net, images, labels + 1, seed=0)
    with pytest.raises(DataError, match="indices must number"):
        UniformNoise()(net, images, labels, ThreatModel("linf", 0.1), seed=0, indices=torch.arange(3))
    with pytest.raises(ModelError, match="not finite"):
        GaussianNoise()(lambda batch: torch.full((len(batch), 3), torch.nan), images, labels, seed=0)
