"""ZOO: slopes against derivatives, distortions against closed forms, queries only, and what any such attack holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qopt.attacks.attack import AttackResult, MinimumAttack, keep_within
from qopt.attacks.gradient import input_gradient
from qopt.attacks.score import accuracy_vector, predict
from qopt.attacks.zoo import ZOO, _adam
from qopt.errors import DataError, UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
SHORT = ZOO(steps=30, search_steps=4, coordinates=16)
WEIGHTS = torch.linspace(-1, 1, 16).double()


def linear(images: Tensor) -> Tensor:
    """Every row by itself, so that the batch changes no bit."""
    return torch.stack([torch.zeros(len(images)).double(), (images.flatten(1).double() * WEIGHTS).sum(1) - 0.1], 1)


def grey(n: int, seed: int = 0) -> Data:
    images = 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return images, linear(images).argmax(1)


def distances(result: AttackResult, images: Tensor) -> Tensor:
    lengths: Tensor = (result.adversarial - images).double().flatten(1).norm(dim=1)
    return lengths


@pytest.fixture(scope="module")
def few(data: Data) -> Data:
    return data[0][:16], data[1][:16]


def test_results_are_legal_and_true(net: nn.Module, few: Data) -> None:
    images, labels = few
    labels = torch.where(torch.arange(16) == 3, (labels + 1) % 3, labels)
    before = images.clone()
    result = SHORT(net, images, labels, seed=0)
    assert result.adversarial.dtype == torch.float32
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(result.fooled, ~accuracy_vector(net, result.adversarial, labels))
    wrong = ~accuracy_vector(net, images, labels)
    assert wrong[3]
    assert torch.equal(result.adversarial[wrong], images[wrong])
    assert result.fooled.float().mean() > 0.9
    assert torch.equal(images, before)


def test_a_linear_models_boundary_is_found() -> None:
    """The nearest point beyond a plane lies at the margin over the norm of its weights."""
    images, labels = grey(12)
    result = ZOO(steps=60, search_steps=8, coordinates=16, learning_rate=0.01)(linear, images, labels, seed=0)
    nearest = linear(images)[:, 1].abs() / WEIGHTS.norm()
    found = distances(result, images)
    assert result.fooled.all()
    assert (found >= nearest - 1e-6).all()
    assert (found <= 1.1 * nearest + 0.01).all()


def test_more_values_of_c_only_come_nearer(net: nn.Module, few: Data) -> None:
    short, long = (replace(SHORT, search_steps=steps)(net, *few, seed=0) for steps in (2, 5))
    assert (long.fooled >= short.fooled).all()
    both = short.fooled & long.fooled
    assert (distances(long, few[0]) <= distances(short, few[0]) + 1e-6)[both].all()
    assert distances(long, few[0])[both].mean() < distances(short, few[0])[both].mean()


def test_a_first_constant_far_too_large_is_lowered() -> None:
    """With it, every pixel moves alike until the boundary is crossed, 1.15 times as far away as need be."""
    images, labels = grey(6)
    nearest = linear(images)[:, 1].abs() / WEIGHTS.norm()
    attack = ZOO(steps=60, search_steps=12, coordinates=16, constant=100.0, learning_rate=0.005)
    lowered, kept = (replace(attack, search_steps=k)(linear, images, labels, seed=0) for k in (12, 1))
    assert (distances(kept, images) / nearest).mean() > 1.1
    assert (distances(lowered, images) / nearest).mean() < 1.06


def test_the_nearest_of_all_that_fool_is_kept() -> None:
    looked: list[Tensor] = []

    def recorder(batch: Tensor) -> Tensor:
        if len(batch) == 1:
            looked.append(batch.clone())
        return linear(batch)

    images, labels = grey(1)
    result = replace(SHORT, batch_size=32)(recorder, images, labels, seed=0)
    seen = torch.cat(looked)
    fooling = linear(seen).argmax(1) != labels
    assert 2 < int(fooling.sum()) < len(seen)
    assert float(distances(result, images)) == float((seen - images)[fooling].double().flatten(1).norm(dim=1).min())


def test_a_success_that_does_not_last_is_none() -> None:
    """Rounding in the model may depend on the batch: here every image that moves fools, but only on its own."""
    images, labels = grey(2)

    def model(batch: Tensor) -> Tensor:
        logits, alone = linear(batch), len(batch) == 1
        return logits.flip(1) if alone and not (batch == images).flatten(1).all(1).any() else logits

    result = replace(SHORT, steps=2, search_steps=1, batch_size=32, learning_rate=1e-4)(model, images, labels, seed=0)
    assert not result.fooled.any()
    assert torch.equal(result.adversarial, images)


def test_a_first_constant_far_too_small_is_raised() -> None:
    images, labels = grey(6)
    attack = ZOO(steps=100, search_steps=6, coordinates=16, constant=1e-4, learning_rate=0.002)
    assert attack(linear, images, labels, seed=0).fooled.all()
    assert not replace(attack, search_steps=1)(linear, images, labels, seed=0).fooled.any()


def test_as_an_attack_of_a_threat_model_it_counts_within_the_ball() -> None:
    images, labels = grey(12)
    result = SHORT(linear, images, labels, seed=0)
    limit = float(distances(result, images).median())
    within = keep_within(result, images, ThreatModel("l2", limit))
    assert 0 < int(within.fooled.sum()) < 12
    assert (distances(within, images) <= limit + 1e-6).all()


def test_rounded_activations_hide_the_differences(net: nn.Module, ste_net: nn.Module, few: Data) -> None:
    """Bernhard et al.: ZOO fails on quantized activations, whatever their gradients are."""
    fooled = [SHORT(model, *few, seed=0).fooled.float().mean() for model in (net, ste_net)]
    assert fooled[0] > 0.9
    assert fooled[1] < 0.3


class TestSlopes:
    def test_they_are_the_derivatives(self, net: nn.Module, few: Data) -> None:
        images, labels = few[0][:5], predict(net, few[0][:5]).argmax(1)
        chosen = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:9] for i in range(5)])
        exact = input_gradient(net, images, labels, "margin").flatten(1).gather(1, chosen).double()
        precise = net.double()
        try:
            # float64 logits: what is left is h and the float32 of the images.
            found = ZOO(batch_size=20)._slopes(lambda x: precise(x.double()), images, labels, chosen)
        finally:
            net.float()
        assert found.dtype == torch.float64
        assert torch.allclose(found, exact, atol=1e-3, rtol=1e-2)

    @pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
    def test_they_do_not_depend_on_the_batch(self, batch_size: int) -> None:
        images, labels = grey(3)
        chosen = torch.tensor([[0, 5, 9], [1, 2, 3], [15, 14, 0]])
        whole = ZOO()._slopes(linear, images, labels, chosen)
        assert torch.equal(ZOO(batch_size=batch_size)._slopes(linear, images, labels, chosen), whole)
        signs = torch.where(labels == 0, 1.0, -1.0).double()
        assert torch.allclose(whole, signs[:, None] * WEIGHTS[chosen], atol=1e-8)

    def test_at_the_walls_of_the_box_they_are_one_sided(self) -> None:
        images = (grey(4)[0] > 0.5).float()
        labels = linear(images).argmax(1)
        chosen = torch.arange(16).repeat(4, 1)
        signs = torch.where(labels == 0, 1.0, -1.0).double()
        assert torch.allclose(ZOO()._slopes(linear, images, labels, chosen), signs[:, None] * WEIGHTS, atol=1e-8)

    def test_a_fooled_image_is_pulled_back_only(self) -> None:
        images, labels = grey(3)
        assert not ZOO()._slopes(linear, images, 1 - labels, torch.zeros(3, 1).long()).any()


def test_adam_counts_every_pixels_own_updates() -> None:
    """Against a loop over pixels with textbook Adam."""
    generator = np.random.default_rng(0)
    state = torch.zeros(3, 2, 5, dtype=torch.float64)
    mean, square, count = np.zeros((2, 5)), np.zeros((2, 5)), np.zeros((2, 5))
    for _ in range(12):
        chosen = np.stack([generator.choice(5, 3, replace=False) for _ in range(2)])
        gradient = generator.normal(size=(2, 3))
        found = _adam(state, torch.from_numpy(chosen), torch.from_numpy(gradient))
        for i in range(2):
            for k, pixel in enumerate(chosen[i]):
                mean[i, pixel] = 0.9 * mean[i, pixel] + 0.1 * gradient[i, k]
                square[i, pixel] = 0.999 * square[i, pixel] + 0.001 * gradient[i, k] ** 2
                count[i, pixel] += 1
                t = count[i, pixel]
                expected = mean[i, pixel] / (1 - 0.9**t) / (np.sqrt(square[i, pixel] / (1 - 0.999**t)) + 1e-8)
                assert float(found[i, k]) == pytest.approx(expected)


class TestQueries:
    @pytest.mark.parametrize("batch_size", [1, 9, 64, 1000])
    def test_they_stay_in_the_box_and_in_the_batch_and_ask_for_no_gradient(self, batch_size: int) -> None:
        asked: list[Tensor] = []

        def recorder(batch: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            assert not batch.requires_grad
            asked.append(batch.clone())
            return linear(batch)

        images = (grey(3)[0] > 0.5).float()
        attack = replace(SHORT, steps=6, search_steps=2, batch_size=batch_size)
        attack(recorder, images, linear(images).argmax(1), seed=0)
        assert max(map(len, asked)) <= batch_size
        assert min(float(batch.min()) for batch in asked) >= 0
        assert max(float(batch.max()) for batch in asked) <= 1
        assert all(batch.dtype == torch.float32 for batch in asked)

    def test_as_many_as_promised(self) -> None:
        asked = [0]

        def counted(batch: Tensor) -> Tensor:
            asked[0] += len(batch)
            return linear(batch)

        images, labels = grey(5)
        labels[0] = 1 - labels[0]
        replace(SHORT, coordinates=7)(counted, images, labels, seed=0)
        assert asked[0] == 4 * 4 * (30 * (2 * 7 + 1) + 1) + 2 * 5


def test_batches_and_parts_change_nothing() -> None:
    images, labels = grey(11)
    attack = replace(SHORT, coordinates=6, search_steps=3, steps=20)
    whole = attack(linear, images, labels, seed=0)
    assert whole.fooled.any()
    part = torch.tensor([10, 2, 5])
    alone = attack(linear, images[part], labels[part], seed=0, indices=part)
    assert torch.equal(alone.adversarial, whole.adversarial[part])
    for batch_size in (4, 50, 5000):
        other = replace(attack, batch_size=batch_size)(linear, images, labels, seed=0)
        assert torch.equal(other.adversarial, whole.adversarial)
        assert torch.equal(other.fooled, whole.fooled)


def test_one_seed_one_result() -> None:
    images, labels = grey(4)
    attack = replace(SHORT, coordinates=5)
    first, again, other = (attack(linear, images, labels, seed=s).adversarial for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_black_and_white_pixels_can_be_attacked(net: nn.Module, few: Data) -> None:
    """In the variable of the hyperbolic tangent they would stay what they are."""
    images = (few[0] > 0.5).float()
    labels = predict(net, images).argmax(1)
    result = replace(SHORT, coordinates=32)(net, images, labels, seed=0)
    assert result.fooled.float().mean() > 0.9


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_changes_nothing(shift: float) -> None:
    images, labels = grey(6)
    plain = SHORT(linear, images, labels, seed=0)
    shifted = SHORT(lambda batch: linear(batch) + shift, images, labels, seed=0)
    assert torch.equal(shifted.fooled, plain.fooled)
    assert torch.allclose(distances(shifted, images), distances(plain, images), rtol=0.05)


def test_log_probabilities_are_as_good_as_logits() -> None:
    images, labels = grey(6)
    plain = SHORT(linear, images, labels, seed=0)
    logs = SHORT(lambda batch: linear(batch).log_softmax(1), images, labels, seed=0)
    assert torch.equal(logs.fooled, plain.fooled)
    assert torch.allclose(distances(logs, images), distances(plain, images), rtol=0.05)


def test_an_image_that_nothing_fools_comes_back() -> None:
    images, _ = grey(4)

    def constant(batch: Tensor) -> Tensor:
        return torch.tensor([[0.0, 1.0]]).repeat(len(batch), 1)

    result = replace(SHORT, steps=3)(constant, images, torch.ones(4, dtype=torch.long), seed=0)
    assert not result.fooled.any()
    assert torch.equal(result.adversarial, images)


def test_all_shapes_of_images_and_memory_are_taken() -> None:
    images, labels = grey(4)
    wide = images.reshape(4, 4, 2, 2)
    plain = SHORT(linear, wide, labels, seed=0)
    last = SHORT(linear, wide.to(memory_format=torch.channels_last), labels, seed=0)
    flat = SHORT(linear, wide.flatten(1), labels, seed=0)
    assert plain.fooled.all()
    assert torch.equal(plain.adversarial, last.adversarial)
    assert torch.equal(plain.adversarial.flatten(1), flat.adversarial)
    with torch.inference_mode():
        inside = SHORT(linear, wide.clone(), labels, seed=0)
    assert torch.equal(inside.adversarial, plain.adversarial)


def test_images_of_fewer_pixels_than_coordinates() -> None:
    images, labels = grey(3)
    result = ZOO(steps=20, search_steps=2)(linear, images, labels, seed=0)
    assert result.fooled.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "ZOO: steps must be .*got 0"),
        ({"search_steps": 0}, "search_steps must be"),
        ({"coordinates": -1}, "coordinates must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"constant": float("nan")}, "constant must be"),
        ({"h": 0.0}, "h must be"),
        ({"h": 1e-8}, "h is lost in the rounding .*expected 1e-06 or larger"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ZOO(**options)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_paper() -> None:
    attack: MinimumAttack = ZOO()
    assert attack.name == "ZOO-10x100"
    assert (ZOO().steps, ZOO().search_steps, ZOO().constant, ZOO().coordinates, ZOO().h) == (100, 10, 0.9, 128, 1e-4)


def test_data_that_does_not_fit_is_refused() -> None:
    images, labels = grey(4)
    cases = [
        (images * 2, labels, None, "outside the box"),
        (images, labels + 2, None, "label out of range"),
        (images, labels, torch.arange(3), "indices must number the images"),
    ]
    for bad_images, bad_labels, indices, message in cases:
        with pytest.raises(DataError, match=message):
            SHORT(linear, bad_images, bad_labels, seed=0, indices=indices)
