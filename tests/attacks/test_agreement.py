"""Every figure against explicit loops that follow the definitions of Bernhard et al. 2019."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qopt.attacks.agreement import (
    Agreement,
    Shift,
    Vote,
    activation_shift,
    agreement,
    gradient_cosines,
    strongest_transfers,
    transfer_matrix,
    transfer_predictions,
    vote,
    weight_shift,
)
from qopt.attacks.gradient import input_gradient
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector, predict
from qopt.errors import DataError, ModelError, UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
seeds = st.integers(0, 100_000)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestTransfers:
    def test_rows_are_sources_and_columns_are_targets(
        self, net: nn.Module, ste_net: nn.Module, rounded_net: nn.Module, data: Data
    ) -> None:
        images, labels = data[0][:40], data[1][:40]
        threat, models = ThreatModel("linf", 0.05), [net, ste_net, rounded_net]
        made = [PGD(steps=5, compact=False)(model, images, labels, threat, seed=0).adversarial for model in models]
        matrix = transfer_matrix(transfer_predictions(made, models, batch_size=7), labels)
        assert matrix.shape == (3, 3)
        assert matrix.dtype == torch.float64
        for row, examples in enumerate(made):
            for column, target in enumerate(models):
                expected = accuracy_vector(target, examples, labels).double().mean()
                assert matrix[row, column] == expected
        assert matrix[2, 0] > matrix[0, 2] + 0.3, "examples of the masked network fool nobody"

    def test_sources_and_targets_need_not_be_the_same(self, net: nn.Module, ste_net: nn.Module, data: Data) -> None:
        images, labels = data[0][:5], data[1][:5]
        predicted = transfer_predictions([images], [net, ste_net])
        assert predicted.shape == (1, 2, 5)
        assert torch.equal(predicted[0, 1], predict(ste_net, images).argmax(1))
        assert transfer_matrix(predicted, labels).shape == (1, 2)

    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), seeds)
    def test_entries_are_accuracies(self, s: int, t: int, n: int, seed: int) -> None:
        predicted = torch.randint(3, (s, t, n), generator=random(seed))
        labels = torch.randint(3, (n,), generator=random(seed + 1))
        matrix = transfer_matrix(predicted, labels)
        for row in range(s):
            for column in range(t):
                right = sum(int(predicted[row, column, i]) == int(labels[i]) for i in range(n))
                assert float(matrix[row, column]) == pytest.approx(right / n)

    @given(st.integers(1, 4), st.integers(2, 4), seeds)
    def test_the_strongest_attack_leaves_the_others_least(self, k: int, s: int, seed: int) -> None:
        matrices = torch.rand(k, s, s, generator=random(seed), dtype=torch.float64)
        found = strongest_transfers(matrices)
        for source in range(s):
            means = [np.mean([float(m[source, t]) for t in range(s) if t != source]) for m in matrices]
            assert means[int(found[source])] == pytest.approx(min(means))

    def test_the_source_itself_does_not_count(self) -> None:
        matrices = torch.tensor([[[0.0, 0.9], [0.5, 0.0]], [[1.0, 0.8], [0.6, 0.0]]])
        assert strongest_transfers(matrices).tolist() == [1, 0]

    def test_what_does_not_fit_is_refused(self, net: nn.Module) -> None:
        images = torch.rand(4, 1, 8, 8)
        for examples, targets in (([], [net]), ([images], []), ([images, images[:3]], [net])):
            with pytest.raises(DataError, match="examples of the same images"):
                transfer_predictions(examples, targets)
        with pytest.raises(ModelError, match="not a classifier's output"):
            transfer_predictions([images], [lambda batch: batch])
        for shape in ((2, 3), (2, 2, 4), (0, 2, 3), (2, 2, 0)):
            with pytest.raises(DataError, match="predictions do not fit"):
                transfer_matrix(torch.zeros(shape, dtype=torch.long), torch.zeros(3, dtype=torch.long))
        for shape in ((2, 2), (1, 2, 3), (2, 1, 1), (0, 2, 2)):
            with pytest.raises(DataError, match="between the same networks"):
                strongest_transfers(torch.zeros(shape))


class TestGradientCosines:
    @given(st.integers(1, 4), st.integers(1, 5), seeds)
    def test_entries_are_means_of_cosines(self, m: int, n: int, seed: int) -> None:
        gradients = torch.randn(m, n, 2, 3, 2, generator=random(seed))
        found = gradient_cosines(gradients)
        for a in range(m):
            for b in range(m):
                cosines = []
                for i in range(n):
                    x, y = gradients[a, i].double().flatten().numpy(), gradients[b, i].double().flatten().numpy()
                    cosines.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
                assert float(found[a, b]) == pytest.approx(np.mean(cosines), abs=1e-9)

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e20])
    def test_the_length_is_of_no_matter(self, scale: float) -> None:
        gradients = torch.randn(2, 3, 8, generator=random(0))
        scaled = torch.stack([gradients[0], scale * gradients[1]])
        assert torch.allclose(gradient_cosines(scaled), gradient_cosines(gradients), atol=1e-6)

    @pytest.mark.parametrize("dead", [0.0, torch.nan, torch.inf])
    def test_dead_gradients_count_as_zero(self, dead: float) -> None:
        gradients = torch.ones(2, 4, 3)
        gradients[1, 0] = dead
        assert torch.allclose(gradient_cosines(gradients), torch.tensor([[1, 0.75], [0.75, 0.75]]).double())

    def test_rounding_breaks_them_and_straight_through_keeps_them(
        self, net: nn.Module, ste_net: nn.Module, rounded_net: nn.Module, data: Data
    ) -> None:
        gradients = torch.stack([input_gradient(m, *data, "cross_entropy") for m in (net, ste_net, rounded_net)])
        found = gradient_cosines(gradients)
        assert torch.allclose(found.diagonal(), torch.tensor([1.0, 1.0, 0.0]).double())
        assert torch.equal(found, found.T)
        assert 0.5 < float(found[0, 1]) < 1
        assert not found[2].any()

    @pytest.mark.parametrize("shape", [(2, 3), (0, 2, 3), (2, 0, 3), (2, 3, 0)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="not gradients"):
            gradient_cosines(torch.zeros(shape))


def share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


class TestAgreement:
    @given(st.integers(2, 4), st.integers(0, 12), seeds)
    def test_rates_are_those_of_a_loop(self, m: int, n: int, seed: int) -> None:
        clean, attacked = (torch.rand(m, n, generator=random(seed + k)) < 0.7 for k in (0, 1))
        for source in range(m):
            rows = [k for k in range(m) if k != source]
            images = range(n)
            right = [bool(all(clean[k, i] for k in rows)) for i in images if clean[source, i]]
            wrong = [bool(all(not clean[k, i] for k in rows)) for i in images if not clean[source, i]]
            before = [i for i in images if clean[source, i]]
            fooled = [all(not attacked[k, i] for k in rows) for i in before if not attacked[source, i]]
            not_fooled = [bool(all(attacked[k, i] for k in rows)) for i in before if attacked[source, i]]
            expected = Agreement(*map(share, (right, wrong, fooled, not_fooled)))
            assert agreement(clean, attacked, source) == expected

    def test_an_example(self) -> None:
        """Five networks: the source, the first, is right about three clean images and fooled on one of them."""
        clean = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
        attacked = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1]]).bool()
        assert agreement(clean, attacked, 0) == Agreement(2 / 3, 1.0, 1.0, 0.5)

    def test_networks_of_which_none_is_ever_wrong(self) -> None:
        right = torch.ones(2, 3, dtype=torch.bool)
        assert agreement(right, right, 1) == Agreement(1.0, None, None, 1.0)

    def test_what_does_not_fit_is_refused(self) -> None:
        right = torch.ones(3, 4, dtype=torch.bool)
        for clean, attacked in (
            (right, right[:2]),
            (right[:1], right[:1]),
            (right.float(), right),
            (right[0], right[0]),
        ):
            with pytest.raises(DataError, match="one boolean per network and image"):
                agreement(clean, attacked, 0)
        for source in (-1, 3):
            with pytest.raises(UsageError, match=r"no such network .*0 to 2"):
                agreement(right, right, source)


class TestShift:
    @given(st.integers(1, 5), st.integers(2, 5), seeds)
    def test_weight_shift_is_that_of_a_loop(self, n: int, classes: int, seed: int) -> None:
        logits = torch.randint(-2, 3, (3, n, classes), generator=random(seed)).float()
        undone, pairs, hit = 0, 0, 0
        for before, after, restored in zip(*logits, strict=True):
            ours = 0
            for i in range(classes):
                for j in range(classes):
                    if before[i] > before[j] and after[i] < after[j]:
                        pairs += 1
                        ours += bool(restored[i] > restored[j])
            undone, hit = undone + ours, hit + (ours > 0)
        assert weight_shift(*logits) == Shift(undone / pairs if pairs else 0.0, pairs, hit / n)

    def test_the_toy_example(self) -> None:
        clean, adversarial, quantized = (
            torch.tensor([[2.0, 1.0]]),
            torch.tensor([[1.0, 2.0]]),
            torch.tensor([[3.0, 0.0]]),
        )
        assert weight_shift(clean, adversarial, quantized) == Shift(1.0, 1, 1.0)
        assert weight_shift(clean, adversarial, adversarial) == Shift(0.0, 1, 0.0)
        assert weight_shift(clean, clean, quantized) == Shift(0.0, 0, 0.0)
        levelled = torch.ones(1, 2)
        assert weight_shift(clean, adversarial, levelled) == Shift(0.0, 1, 0.0)

    @given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 4), st.booleans(), seeds)
    def test_activation_shift_is_that_of_a_loop(self, n: int, d: int, levels: int, alike: bool, seed: int) -> None:
        floats = torch.randint(0, 9, (n, d), generator=random(seed)) / 8
        # By channels, equal activations need not stay equal.
        other = floats if alike else torch.rand(n, d, generator=random(seed + 1))
        quantized = (other * levels).round() / levels
        undone, pairs, hit = 0, 0, 0
        for before, after in zip(floats, quantized, strict=True):
            different = [(i, j) for i, j in combinations(range(d), 2) if before[i] != before[j]]
            ours = sum(bool(after[i] == after[j]) for i, j in different)
            undone, pairs, hit = undone + ours, pairs + len(different), hit + (ours > 0)
        assert activation_shift(floats, quantized) == Shift(undone / pairs if pairs else 0.0, pairs, hit / n)

    def test_equal_pairs_that_quantization_splits_do_not_count(self) -> None:
        """As rounding by channels may: nothing is made equal here."""
        assert activation_shift(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[0.9, 1.1, 2.0]])) == Shift(0.0, 2, 0.0)

    def test_all_axes_but_the_first_are_neurons(self) -> None:
        floats = torch.randn(3, 2, 4, 5, generator=random(0))
        assert activation_shift(floats, floats.round()) == activation_shift(
            floats.flatten(1), floats.flatten(1).round()
        )

    def test_fewer_bits_shift_more(self) -> None:
        floats = torch.rand(4, 500, generator=random(0))
        rates = [activation_shift(floats, (floats * (2**b - 1)).round() / (2**b - 1)).rate for b in (8, 4, 2, 1)]
        assert rates == sorted(rates)
        assert activation_shift(floats, floats).rate == 0
        assert activation_shift(floats, torch.zeros_like(floats)).rate == 1

    def test_zeros_of_either_sign_are_equal(self) -> None:
        assert activation_shift(torch.tensor([[0.0, -0.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.0]])) == Shift(1.0, 2, 1.0)

    def test_large_layers_are_counted_without_all_pairs(self) -> None:
        floats = torch.linspace(0, 1, 100_000)[None]
        found = activation_shift(floats, (floats > 0.5).float())
        assert found.pairs == 100_000 * 99_999 // 2
        assert found.rate == pytest.approx(0.5, abs=1e-4)

    def test_what_does_not_fit_is_refused(self) -> None:
        logits = torch.zeros(2, 3)
        for three in ((logits, logits, logits[:1]), (logits[0], logits[0], logits[0]), 3 * (logits[:0],)):
            with pytest.raises(DataError, match="same images and classes"):
                weight_shift(*three)
        for two in ((logits, logits[:1]), (logits[0], logits[0]), (logits[:0], logits[:0])):
            with pytest.raises(DataError, match="activations must pair up"):
                activation_shift(*two)


class TestVote:
    @given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), seeds)
    def test_figures_are_those_of_a_loop(self, m: int, n: int, classes: int, seed: int) -> None:
        predicted = torch.randint(classes, (m, n), generator=random(seed))
        labels = torch.randint(classes, (n,), generator=random(seed + 1))
        for threshold in range(m // 2 + 1, m + 1):
            valid = right = 0
            for i in range(n):
                answer, votes = Counter(predicted[:, i].tolist()).most_common(1)[0]
                if votes >= threshold:
                    valid += 1
                    right += answer == int(labels[i])
            expected = Vote(valid / n, right / valid if valid else None, 1 - (valid - right) / n)
            assert vote(predicted, labels, threshold) == expected

    def test_a_higher_threshold_answers_less_and_errs_less(self) -> None:
        predicted, labels = torch.randint(3, (5, 300), generator=random(0)), torch.zeros(300, dtype=torch.long)
        votes = [vote(predicted, labels, threshold) for threshold in (3, 4, 5)]
        assert votes[0].prediction_rate > votes[1].prediction_rate > votes[2].prediction_rate
        assert votes[0].defence_accuracy < votes[1].defence_accuracy < votes[2].defence_accuracy

    def test_networks_that_are_one_answer_always(self, net: nn.Module, data: Data) -> None:
        predicted = predict(net, data[0]).argmax(1).repeat(5, 1)
        accuracy = float(accuracy_vector(net, *data).double().mean())
        found = vote(predicted, data[1], 5)
        assert found.prediction_rate == 1
        assert found.accuracy == pytest.approx(accuracy)
        assert found.defence_accuracy == pytest.approx(accuracy)

    @pytest.mark.parametrize(("members", "threshold"), [(5, 2), (5, 6), (4, 2), (1, 0), (2, 1)])
    def test_a_threshold_is_a_majority(self, members: int, threshold: int) -> None:
        predicted = torch.zeros(members, 3, dtype=torch.long)
        with pytest.raises(UsageError, match=f"majority .*expected {members // 2 + 1} to {members}, got {threshold}"):
            vote(predicted, torch.zeros(3, dtype=torch.long), threshold)

    @pytest.mark.parametrize("shape", [(3,), (2, 4), (0, 3)])
    def test_predictions_that_do_not_fit_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="predictions do not fit the labels"):
            vote(torch.zeros(shape, dtype=torch.long), torch.zeros(3, dtype=torch.long), 1)
