"""SPSA: what its estimates are, that only queries are used, and what holds of every attack."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qopt.attacks.attack import Attack, AttackResult
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector, predict
from qopt.attacks.spsa import SPSA, _signs
from qopt.errors import DataError, ModelError, UsageError
from qopt.graph.to_onnx import module_to_onnx
from qopt.runtime.session import Runner, to_bytes
from qopt.threat import Norm, ThreatModel

Data = tuple[Tensor, Tensor]
THREATS = [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)]
SHORT = SPSA(steps=8, samples=32, batch_size=256)
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


@pytest.fixture(scope="module")
def few(data: Data) -> Data:
    return data[0][:40], data[1][:40]


def linear(images: Tensor) -> Tensor:
    """Every row by itself, so that the batch changes no bit: the first pixel against the others' weighted sum."""
    flat = images.flatten(1).double()
    weights = torch.linspace(-1, 1, flat.shape[1]).double()
    return torch.stack([torch.zeros(len(flat)).double(), (flat * weights).sum(1) - 0.1], 1)


def grey(n: int, seed: int = 0) -> Data:
    images = 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return images, linear(images).argmax(1)


def distances(result: AttackResult, images: Tensor, norm: Norm) -> Tensor:
    move = (result.adversarial - images).double().flatten(1)
    return move.abs().amax(1) if norm == "linf" else move.norm(dim=1)


@per_threat
def test_results_are_legal_and_true(ste_net: nn.Module, few: Data, threat: ThreatModel) -> None:
    images, labels = few
    labels = torch.where(torch.arange(40) % 10 == 0, (labels + 1) % 3, labels)
    before = images.clone()
    result = SHORT(ste_net, images, labels, threat, seed=0)
    assert result.adversarial.dtype == torch.float32
    assert (distances(result, images, threat.norm) <= threat.eps + 1e-6).all()
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(result.correct, accuracy_vector(ste_net, result.adversarial, labels))
    wrong = ~accuracy_vector(ste_net, images, labels)
    assert torch.equal(result.adversarial[wrong], images[wrong])
    assert result.fooled[wrong].all()
    assert torch.equal(images, before)
    assert result.correct.float().mean() < 0.8


@per_threat
def test_it_comes_near_the_attack_that_knows_the_gradients(net: nn.Module, few: Data, threat: ThreatModel) -> None:
    pgd = PGD(steps=30, restarts=2)(net, *few, threat, seed=0).correct
    found = SPSA(steps=40)(net, *few, threat, seed=0).correct
    assert 0 < int(pgd.sum()) <= int(found.sum()) <= int(pgd.sum()) + 2


@per_threat
def test_rounding_that_stops_gradients_does_not_stop_it(rounded_net: nn.Module, few: Data, threat: ThreatModel) -> None:
    white = PGD()(rounded_net, *few, threat, seed=0).correct.float().mean()
    found = SPSA(steps=20, samples=64)(rounded_net, *few, threat, seed=0).correct.float().mean()
    assert found < white - 0.3


def test_no_gradient_is_asked_for(few: Data) -> None:
    seen: list[bool] = []

    def model(images: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled() or images.requires_grad)
        return linear(images)

    images, labels = grey(4)
    SHORT(model, images, labels, THREATS[0], seed=0)
    assert not any(seen)


def test_a_file_in_onnx_runtime_is_attacked_as_its_network(net: nn.Module, few: Data) -> None:
    images, labels = few[0][:12], few[1][:12]
    runner = Runner(to_bytes(module_to_onnx(net, (1, 8, 8))))

    def runtime(batch: Tensor) -> Tensor:
        return torch.from_numpy(runner(batch.numpy()))

    ours = SHORT(net, images, labels, THREATS[0], seed=0)
    theirs = SHORT(runtime, images, labels, THREATS[0], seed=0)
    assert (ours.fooled != theirs.fooled).sum() <= 1
    assert 0 < int(theirs.fooled.sum()) < 12


class TestQueries:
    @staticmethod
    def counted(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        asked: list[Tensor] = []

        def recorder(batch: Tensor) -> Tensor:
            asked.append(batch.clone())
            return model(batch)

        return recorder, asked

    @pytest.mark.parametrize("batch_size", [1, 5, 64, 1000])
    def test_they_stay_in_the_box_and_in_the_batch(self, batch_size: int) -> None:
        images = (grey(6)[0] > 0.5).float()
        model, asked = self.counted(linear, images)
        replace(SHORT, batch_size=batch_size)(model, images, linear(images).argmax(1), THREATS[0], seed=0)
        assert max(map(len, asked)) <= batch_size
        assert min(float(batch.min()) for batch in asked) >= 0
        assert max(float(batch.max()) for batch in asked) <= 1
        assert all(batch.dtype == torch.float32 for batch in asked)

    def test_no_more_than_promised(self) -> None:
        images, labels = grey(5)
        model, asked = self.counted(linear, images)
        result = SHORT(model, images, labels, ThreatModel("linf", 1e-4), seed=0)
        assert not result.fooled.any()
        assert sum(map(len, asked)) == 5 * (SHORT.samples + 1) * SHORT.steps + 2 * 5

    def test_fooled_images_leave(self) -> None:
        images, labels = grey(5)
        model, asked = self.counted(linear, images)
        assert SHORT(model, images, labels, ThreatModel("linf", 0.5), seed=0).fooled.all()
        assert sum(map(len, asked)) < 5 * (SHORT.samples + 1) * SHORT.steps / 2


@pytest.mark.parametrize("threat", [THREATS[0], ThreatModel("l2", 0.1)], ids=str)
def test_batches_and_parts_change_nothing(threat: ThreatModel) -> None:
    images, labels = grey(30)
    whole = SHORT(linear, images, labels, threat, seed=0)
    assert 0 < int(whole.fooled.sum()) < 30
    part = torch.arange(29, 3, -4)
    alone = SHORT(linear, images[part], labels[part], threat, seed=0, indices=part)
    assert torch.equal(alone.adversarial, whole.adversarial[part])
    for batch_size in (32, 100, 5000):
        other = replace(SHORT, batch_size=batch_size)(linear, images, labels, threat, seed=0)
        assert torch.allclose(other.adversarial, whole.adversarial, atol=1e-6)
        assert torch.equal(other.fooled, whole.fooled)


def test_one_seed_one_result() -> None:
    images, labels = grey(8)
    first, again, other = (SHORT(linear, images, labels, THREATS[0], seed=s).adversarial for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_randomness_elsewhere_is_left_alone() -> None:
    images, labels = grey(3)
    torch_state, numpy_state = torch.random.get_rng_state(), pickle.dumps(np.random.get_state())
    SHORT(linear, images, labels, THREATS[0], seed=0)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert pickle.dumps(np.random.get_state()) == numpy_state


def test_the_estimate_is_the_mean_over_its_directions() -> None:
    """Against a loop over pairs that follows the definition, with the same signs."""
    images, labels = grey(3)
    attack = SPSA(samples=10, delta=0.02, batch_size=4)
    found = attack._estimate(linear, images, labels, [np.random.default_rng(i) for i in range(3)])
    for i in range(3):
        total = torch.zeros(1, 4, 4).double()
        sign = 1 if labels[i] == 0 else -1
        for v in _signs(np.random.default_rng(i), 5, images):
            ahead, behind = ((linear((images[i] + d * v)[None])[0, 1]) * sign for d in (0.02, -0.02))
            total += (ahead - behind) / (2 * 0.02) * v.double() / 5
        assert torch.allclose(found[i].double(), total, atol=1e-5)


def test_estimates_are_right_on_average() -> None:
    images, labels = grey(1)
    attack = SPSA(samples=20_000, batch_size=4096)
    found = attack._estimate(linear, images, labels, [np.random.default_rng(1)]).flatten()
    expected = torch.linspace(-1, 1, 16) * (1 if labels[0] == 0 else -1)
    assert (found - expected).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.99


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_signs_are_fair(count: int) -> None:
    signs = _signs(np.random.default_rng(0), count, torch.zeros(2, 3, 5, 7))
    assert signs.shape == (count, 3, 5, 7)
    assert signs.dtype == torch.float32
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    if count == 1000:
        assert abs(float(signs.mean())) < 0.01
        assert float(signs.mean(0).abs().max()) < 0.2
        assert float(signs.flatten(1).mean(1).abs().max()) < 0.5


def test_a_linear_model_falls_where_it_must() -> None:
    """The margin of a linear model falls by eps times the l1 norm of its weights, and no further."""
    images, labels = grey(20)
    margins = linear(images)[:, 1].abs()
    reach = torch.linspace(-1, 1, 16).abs().sum() * 0.05
    result = SPSA(steps=30, samples=64)(linear, images, labels, ThreatModel("linf", 0.05), seed=0)
    assert result.fooled[margins < 0.98 * reach].all()
    assert not result.fooled[margins > reach].any()
    assert 0 < int(result.fooled.sum()) < 20


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_clean_accuracy(norm: Norm) -> None:
    images, labels = grey(6)
    labels[0] = 1 - labels[0]
    result = SHORT(linear, images, labels, ThreatModel(norm, 0.0), seed=0)
    assert torch.equal(result.adversarial, images)
    assert result.fooled.tolist() == [True] + 5 * [False]


def test_black_and_white_pixels_can_be_attacked(net: nn.Module, few: Data) -> None:
    images = (few[0][:15] > 0.5).float()
    labels = predict(net, images).argmax(1)
    result = SPSA(steps=20, samples=64)(net, images, labels, ThreatModel("linf", 0.3), seed=0)
    assert result.correct.float().mean() < 0.5


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_changes_nothing(net: nn.Module, few: Data, shift: float) -> None:
    plain = SHORT(net, *few, THREATS[0], seed=0)
    shifted = SHORT(lambda images: net(images) + shift, *few, THREATS[0], seed=0)
    assert (plain.fooled != shifted.fooled).sum() <= 1


def test_a_constant_model_is_never_fooled_and_a_wrong_one_always() -> None:
    images, _ = grey(4)

    def constant(batch: Tensor) -> Tensor:
        return torch.tensor([[0.0, 1.0]]).repeat(len(batch), 1)

    right, wrong = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    kept = SHORT(constant, images, right, THREATS[0], seed=0)
    assert not kept.fooled.any()
    assert torch.equal(kept.adversarial, images)
    assert SHORT(constant, images, wrong, THREATS[0], seed=0).fooled.all()


def test_all_shapes_of_images_and_memory_are_taken() -> None:
    images = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = linear(images).argmax(1)
    threat = ThreatModel("l2", 0.5)
    plain = SHORT(linear, images, labels, threat, seed=0)
    last = SHORT(linear, images.to(memory_format=torch.channels_last), labels, threat, seed=0)
    flat = SHORT(linear, images.flatten(1), labels, threat, seed=0)
    assert torch.equal(plain.adversarial, last.adversarial)
    assert torch.equal(plain.fooled, flat.fooled)
    with torch.inference_mode():
        inside = SHORT(linear, images.clone(), labels, threat, seed=0)
    assert torch.equal(inside.adversarial, plain.adversarial)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "SPSA: steps must be .*got 0"),
        ({"samples": 0}, "samples must be"),
        ({"samples": 7}, "samples come in pairs .*got 7"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"learning_rate": float("inf")}, "learning_rate must be"),
        ({"delta": -0.1}, "delta must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SPSA(**options)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_paper() -> None:
    attack: Attack = SPSA()
    assert attack.name == "SPSA-100"
    assert (SPSA().steps, SPSA().delta, SPSA().samples) == (100, 0.01, 128)
    images, labels = grey(5)
    eps = ThreatModel(eps=0.03)
    given, default = (SPSA(steps=3, learning_rate=r)(linear, images, labels, eps, seed=0) for r in (0.01, None))
    assert torch.allclose(given.adversarial, default.adversarial, atol=1e-6)


def test_data_that_does_not_fit_is_refused() -> None:
    images, labels = grey(4)
    cases = [
        (images * 2, labels, None, "outside the box"),
        (images, labels + 2, None, "label out of range"),
        (images, labels[:-1], None, "do not fit the images"),
        (images, labels, torch.arange(3), "indices must number the images"),
    ]
    for bad_images, bad_labels, indices, message in cases:
        with pytest.raises(DataError, match=message):
            SHORT(linear, bad_images, bad_labels, THREATS[0], seed=0, indices=indices)


def test_a_logit_that_is_not_finite_is_an_error() -> None:
    images = torch.full((2, 1, 2, 2), 0.5)

    def spoiled(batch: Tensor) -> Tensor:
        total = batch.flatten(1).sum(1)
        return torch.stack([total, torch.where(total == 2, total / 2, torch.nan)], 1)

    with pytest.raises(ModelError, match="not finite"):
        SHORT(spoiled, images, torch.zeros(2, dtype=torch.long), THREATS[0], seed=0)
