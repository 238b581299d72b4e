"""Every rule is triggered by a network planted for it, and none by honest ones, quantized or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.checklist import Budget, Known, checklist
from qopt.attacks.cw import CW
from qopt.attacks.fgsm import FGSM
from qopt.attacks.masking import Finding, transferred_correct, verdict
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector, worst_case
from qopt.attacks.spsa import SPSA
from qopt.attacks.zoo import ZOO
from qopt.errors import DataError, UsageError
from qopt.threat import ThreatModel

Data = tuple[Tensor, Tensor]
THREAT = ThreatModel("linf", 0.05)
BUDGET = Budget(images=60, queried_images=20, longer=PGD(steps=60), queries=SPSA(steps=12, samples=64))
NEAREST = replace(BUDGET, nearest=(CW(), ZOO(steps=20, search_steps=3, coordinates=32)), nearest_images=16)
RULES = [
    "zero_gradients", "queries_stronger", "unbounded_attack", "accuracy_rises", "iterative_weaker", "not_converged",
    "noise_as_strong", "losses_disagree",
]  # fmt: skip


def triggered(findings: Iterable[Finding]) -> set[str]:
    return {finding.rule for finding in findings if finding.triggered}


def bent(images: Tensor, factor: Tensor | float) -> Tensor:
    """``images``, with their gradient times ``factor``."""
    return images.detach() + factor * (images - images.detach())


@pytest.fixture(scope="module")
def rounded_weights(net: nn.Module) -> nn.Module:
    """Four bits, to nearest, weights only."""
    quantized = copy.deepcopy(net)
    for name, weight in quantized.named_parameters():
        if name.endswith("weight"):
            step = weight.detach().abs().max() / 7
            weight.data = (weight.data / step).round() * step
    return quantized


class TestHonestNetworks:
    @pytest.mark.parametrize("threat", [THREAT, ThreatModel("l2", 0.35)], ids=str)
    def test_none_is_triggered(
        self, net: nn.Module, ste_net: nn.Module, rounded_weights: nn.Module, data: Data, threat: ThreatModel
    ) -> None:
        for model in (net, ste_net, rounded_weights):
            findings = checklist(model, *data, threat, seed=0, budget=BUDGET)
            assert [finding.rule for finding in findings] == RULES
            assert triggered(findings) == set()
            assert verdict(findings) == "none"

    @pytest.mark.parametrize("eps", [0.001, 0.15, 0.5], ids=["clean", "zero", "far beyond"])
    def test_none_is_triggered_where_there_is_nothing_to_see(
        self, net: nn.Module, ste_net: nn.Module, data: Data, eps: float
    ) -> None:
        for model in (net, ste_net):
            assert triggered(checklist(model, *data, ThreatModel("linf", eps), seed=0, budget=BUDGET)) == set()

    def test_nor_with_zoo_which_rounding_stops(self, net: nn.Module, ste_net: nn.Module, data: Data) -> None:
        for model, left in ((net, 0.1), (ste_net, 0.5)):
            *_, last = checklist(model, *data, THREAT, seed=0, budget=NEAREST)
            assert last.rule == "queries_nearer"
            assert not last.triggered
            assert last.numbers["images"] == 16
            assert (last.numbers["queried"] > left) is (model is ste_net)

    def test_the_deployed_function_may_be_asked_instead(
        self, ste_net: nn.Module, rounded_net: nn.Module, data: Data
    ) -> None:
        """The twin with straight-through gradients is honest about the file, which has none."""
        findings = checklist(ste_net, *data, THREAT, seed=0, artefact=rounded_net, budget=BUDGET)
        assert triggered(findings) == set()


class TestPlantedNetworks:
    def test_rounding_without_straight_through(self, net: nn.Module, rounded_net: nn.Module, data: Data) -> None:
        transferred = transferred_correct(net, rounded_net, *data, THREAT, seed=0)
        findings = checklist(rounded_net, *data, THREAT, seed=0, known=Known(transferred=transferred), budget=BUDGET)
        found = triggered(findings)
        assert found == {"zero_gradients", "queries_stronger", "transfer_stronger", "unbounded_attack"}
        assert verdict(findings) == "masked"

    def test_gradients_that_point_the_wrong_way(self, net: nn.Module, data: Data) -> None:
        def model(images: Tensor) -> Tensor:
            logits: Tensor = net(bent(images, -1.0))
            return logits

        findings = checklist(model, *data, THREAT, seed=0, budget=BUDGET)
        assert {"queries_stronger", "unbounded_attack"} <= triggered(findings)
        assert "zero_gradients" not in triggered(findings)
        findings = checklist(model, *data, ThreatModel("linf", 0.3), seed=0, budget=BUDGET)
        assert "noise_as_strong" in triggered(findings)

    def test_gradients_that_are_right_at_clean_images_only(self, net: nn.Module, data: Data) -> None:
        known = data[0].double().flatten(1).sum(1)

        def model(images: Tensor) -> Tensor:
            clean = torch.isin(images.double().flatten(1).sum(1), known)
            logits: Tensor = net(bent(images, torch.where(clean, 1.0, -1.0)[:, None, None, None]))
            return logits

        findings = {f.rule: f for f in checklist(model, *data, THREAT, seed=0, budget=BUDGET)}
        assert findings["iterative_weaker"].triggered
        assert not findings["zero_gradients"].triggered
        assert findings["iterative_weaker"].numbers["iterative"] > 0.8
        assert findings["queries_stronger"].numbers["white_box"] < 0.6, "the one step counts among white-box attacks"

    def test_gradients_that_are_right_near_clean_images_only(self, net: nn.Module, data: Data) -> None:
        def model(images: Tensor) -> Tensor:
            flat = images.detach().flatten(1)
            near = torch.cdist(flat, data[0].flatten(1), p=1).amin(1) / 64 < 0.055
            logits: Tensor = net(bent(images, torch.where(near, 1.0, -1.0)[:, None, None, None]))
            return logits

        findings = {f.rule: f for f in checklist(model, *data, THREAT, seed=0, budget=BUDGET)}
        assert findings["accuracy_rises"].triggered
        assert findings["accuracy_rises"].numbers["larger_eps"] == pytest.approx(0.2)
        assert not findings["iterative_weaker"].triggered

    def test_gradients_of_few_pixels_at_a_time(self, net: nn.Module, data: Data) -> None:
        generator = torch.Generator().manual_seed(0)

        def model(images: Tensor) -> Tensor:
            chosen = torch.rand(len(images), 64, generator=generator).topk(6).indices
            factor = torch.zeros(len(images), 64).scatter(1, chosen, 1.0)
            logits: Tensor = net(bent(images, factor.reshape(images.shape)))
            return logits

        findings = checklist(model, *data, THREAT, seed=0, budget=BUDGET)
        assert triggered(findings) == {"not_converged"}
        assert verdict(findings) == "none"

    def test_a_decoy_class_that_only_cross_entropy_follows(self) -> None:
        """Logits so small that the softmax is flat: half of the weight is on a class that never wins."""
        weights = torch.linspace(0.5, 1, 16)

        def model(images: Tensor) -> Tensor:
            along = (images.flatten(1) - 0.5) @ weights
            return 1e-3 * torch.stack([torch.zeros_like(along), along - 0.3, -1.5 * along - 20], 1)

        images = 0.45 + 0.1 * torch.rand(100, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        labels = model(images).argmax(1)
        assert not labels.any()
        found = triggered(checklist(model, images, labels, THREAT, seed=0, budget=BUDGET))
        assert "losses_disagree" in found
        assert "zero_gradients" not in found

    def test_zoo_nearer_on_the_images_it_fools(self, net: nn.Module, ste_net: nn.Module, data: Data) -> None:
        """Bright images are hidden from differences; on dark ones, a third of the gradient points the wrong way."""
        factor = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0).reshape(1, 1, 8, 8)

        def model(images: Tensor) -> Tensor:
            bright = images.detach().flatten(1).mean(1, keepdim=True) > 0.5
            return torch.where(bright, ste_net(images), net(bent(images, factor)))

        *_, last = checklist(model, *data, THREAT, seed=0, budget=replace(NEAREST, nearest_images=30))
        assert last.rule == "queries_nearer"
        assert last.triggered, last.text


class TestKnownResults:
    @staticmethod
    def counting(model: Classifier) -> tuple[Classifier, list[int]]:
        asked = [0]

        def counted(images: Tensor) -> Tensor:
            asked[0] += len(images)
            return model(images)

        return counted, asked

    def test_they_are_not_measured_again(self, net: nn.Module, data: Data) -> None:
        attacks = (BUDGET.one_step, BUDGET.iterative, BUDGET.other_loss, BUDGET.longer)
        white = {attack.name: attack(net, *data, THREAT, seed=0).correct for attack in attacks}
        queried = {BUDGET.queries.name: BUDGET.queries(net, *data, THREAT, seed=0).correct}
        costs, found = [], []
        for known in (Known(), Known(white=white), Known(white=white, queried=queried)):
            model, asked = self.counting(net)
            found.append(checklist(model, *data, THREAT, seed=0, known=known, budget=BUDGET))
            costs.append(asked[0])
        assert costs[0] > costs[1] > costs[2]
        assert [f.numbers for f in found[0]] == [f.numbers for f in found[1]] == [f.numbers for f in found[2]]

    def test_all_white_box_attacks_count_as_one(self, net: nn.Module, data: Data) -> None:
        """A stronger attack that only the caller knows of is not outdone by queries."""
        stronger = torch.zeros(150, dtype=torch.bool)
        plain, more = (
            {f.rule: f for f in checklist(net, *data, THREAT, seed=0, known=known, budget=BUDGET)}
            for known in (Known(), Known(white={"another": stronger}))
        )
        assert plain["queries_stronger"].numbers["white_box"] > 0
        assert more["queries_stronger"].numbers["white_box"] == 0
        assert more["iterative_weaker"].numbers == plain["iterative_weaker"].numbers

    def test_all_attacks_by_queries_count_as_one(self, net: nn.Module, data: Data) -> None:
        known = Known(queried={"another": torch.zeros(150, dtype=torch.bool)})
        plain, more = (
            {f.rule: f for f in checklist(net, *data, THREAT, seed=0, known=k, budget=BUDGET)}["queries_stronger"]
            for k in (Known(), known)
        )
        assert more.numbers["queried"] < plain.numbers["queried"]
        assert more.triggered

    def test_known_examples_serve_the_last_rule(self, net: nn.Module, data: Data) -> None:
        assert NEAREST.nearest is not None
        model, asked = self.counting(net)
        results = {attack.name: attack(net, data[0][:150], data[1], seed=0) for attack in (FastNearest("CW-L2"),)}
        far = AttackResult(results["CW-L2"].adversarial, results["CW-L2"].fooled)
        known = Known(nearest={NEAREST.nearest[0].name: far, NEAREST.nearest[1].name: far})
        *_, last = checklist(model, *data, THREAT, seed=0, known=known, budget=NEAREST)
        cost, asked[0] = asked[0], 0
        checklist(model, *data, THREAT, seed=0, budget=BUDGET)
        assert cost == asked[0]
        assert last.numbers["l2"] == last.numbers["l2_queried"] > 0

    @pytest.mark.parametrize(
        ("known", "name"),
        [
            (Known(white={"PGD-20": torch.ones(149).bool()}), "PGD-20"),
            (Known(queried={"SPSA-12": torch.ones(151).bool()}), "SPSA-12"),
            (Known(transferred=torch.ones(1, 150).bool()), "transferred"),
            (Known(nearest={"ZOO": AttackResult(torch.zeros(3, 1, 8, 8), torch.ones(3).bool())}), "ZOO"),
        ],
    )
    def test_about_other_images_they_are_refused(self, net: nn.Module, data: Data, known: Known, name: str) -> None:
        with pytest.raises(DataError, match=f"{name}: known results must be about the same images .*150 entries"):
            checklist(net, *data, THREAT, seed=0, known=known, budget=BUDGET)


class FastNearest:
    """One step of several lengths: the first that fools."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, *, seed: int, indices: Tensor | None = None
    ) -> AttackResult:
        best = images.clone()
        for eps in (0.3, 0.1, 0.05):
            result = FGSM()(model, images, labels, ThreatModel("linf", eps), seed=seed)
            best[result.fooled] = result.adversarial[result.fooled]
        return AttackResult(best, ~accuracy_vector(model, best, labels))


class TestBudget:
    def test_it_bounds_the_images(self, net: nn.Module, data: Data) -> None:
        budget = replace(BUDGET, images=30, queried_images=10)
        findings = checklist(net, *data, THREAT, seed=0, budget=budget)
        assert [f.numbers["images"] for f in findings] == [150, 10, 30, 30, 30, 30, 30, 30]
        wide = replace(BUDGET, images=1000, queried_images=1000)
        few = data[0][:20], data[1][:20]
        assert {f.numbers["images"] for f in checklist(net, *few, THREAT, seed=0, budget=wide)} == {20}

    def test_the_accuracies_are_those_of_the_attacks(self, net: nn.Module, data: Data) -> None:
        findings = {f.rule: f.numbers for f in checklist(net, *data, THREAT, seed=3, budget=BUDGET)}
        correct: Callable[[FGSM | PGD], Tensor] = lambda attack: attack(net, *data, THREAT, seed=3).correct  # noqa: E731
        vectors = [correct(attack) for attack in (FGSM(), PGD(), PGD(loss="margin"), PGD(steps=60))]
        one, iterative, margin, longer = (float(vector[:60].double().mean()) for vector in vectors)
        assert findings["iterative_weaker"] == {"iterative": iterative, "one_step": one, "images": 60}
        assert findings["not_converged"] == {"fewer_steps": iterative, "more_steps": longer, "images": 60}
        assert findings["losses_disagree"] == {"cross_entropy": iterative, "margin": margin, "images": 60}
        worst = worst_case(vectors)[:20]
        assert findings["queries_stronger"]["white_box"] == float(worst.double().mean())

    def test_one_seed_one_result(self, net: nn.Module, data: Data) -> None:
        few = data[0][:30], data[1][:30]
        first, again = (checklist(net, *few, THREAT, seed=4, budget=BUDGET) for _ in range(2))
        assert first == again

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"images": 0}, "images must be"),
            ({"queried_images": 0}, "queried_images must be"),
            ({"nearest_images": 0}, "nearest_images must be"),
            ({"eps_factors": (1.0,)}, "two or more different positive numbers"),
            ({"eps_factors": (1.0, 1.0)}, "two or more different positive numbers"),
            ({"eps_factors": (1.0, 0.0)}, "two or more different positive numbers"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Budget(**options)  # type: ignore[arg-type]


def test_without_a_ball_there_is_nothing_to_judge(net: nn.Module, data: Data) -> None:
    with pytest.raises(DataError, match=r"masking cannot be judged without an attack .*linf 0"):
        checklist(net, *data, ThreatModel("linf", 0.0), seed=0)


def test_data_that_does_not_fit_is_refused(net: nn.Module, data: Data) -> None:
    images, labels = data
    for bad_images, bad_labels, message in (
        (images * 2, labels, "outside the box"),
        (images, labels + 3, "label out of range"),
        (images, labels[:-1], "do not fit the images"),
    ):
        with pytest.raises(DataError, match=message):
            checklist(net, bad_images, bad_labels, THREAT, seed=0, budget=BUDGET)
