from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qopt.attacks.attack import Classifier
from qopt.attacks.fgsm import FGSM
from qopt.attacks.masking import (
    Finding,
    accuracy_rises,
    dead_gradients,
    iterative_weaker,
    losses_disagree,
    noise_as_strong,
    not_converged,
    queries_nearer,
    queries_stronger,
    transfer_stronger,
    transferred_correct,
    unbounded_attack,
    unbounded_correct,
    verdict,
    zero_gradients,
)
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector
from qopt.errors import DataError
from qopt.threat import ThreatModel

THREAT = ThreatModel("linf", 0.05)
Data = tuple[Tensor, Tensor]


def flags(true: int, n: int) -> Tensor:
    return torch.arange(n) < true


def findings(source: Classifier, target: Classifier, data: Data) -> dict[str, Finding]:
    white = PGD()(target, *data, THREAT, seed=0).correct
    found = [
        zero_gradients(dead_gradients(target, *data)),
        unbounded_attack(unbounded_correct(target, *data, seed=0)),
        transfer_stronger(white, transferred_correct(source, target, *data, THREAT, seed=0)),
    ]
    return {finding.rule: finding for finding in found}


def test_rounding_without_straight_through_triggers_every_rule(
    net: nn.Module, rounded_net: nn.Module, data: Data
) -> None:
    found = findings(net, rounded_net, data)
    assert list(found) == ["zero_gradients", "unbounded_attack", "transfer_stronger"]
    assert all(finding.triggered for finding in found.values())
    assert verdict(list(found.values())) == "masked"
    assert found["zero_gradients"].numbers == {"share": 1.0, "images": 150}
    assert found["unbounded_attack"].numbers["accuracy"] > 0.2
    shares = found["transfer_stronger"].numbers
    assert shares["transferred"] < shares["white_box"] - 0.3


def test_the_same_network_under_straight_through_triggers_none(
    net: nn.Module, rounded_net: nn.Module, ste_net: nn.Module, data: Data
) -> None:
    assert torch.equal(rounded_net(data[0]), ste_net(data[0]))
    assert not any(finding.triggered for finding in findings(net, ste_net, data).values())
    assert verdict(list(findings(net, ste_net, data).values())) == "none"


def test_the_float_network_triggers_none(net: nn.Module, ste_net: nn.Module, data: Data) -> None:
    assert verdict(list(findings(ste_net, net, data).values())) == "none"


@pytest.mark.parametrize(
    ("dead", "n", "triggered"), [(0, 200, False), (2, 200, False), (3, 200, True), (1, 50, True), (200, 200, True)]
)
def test_zero_gradients_above_one_percent(dead: int, n: int, triggered: bool) -> None:
    finding = zero_gradients(flags(dead, n))
    assert finding.triggered is triggered
    assert finding.tolerance == 0.01
    assert finding.numbers == {"share": dead / n, "images": n}


@pytest.mark.parametrize(("left", "n", "triggered"), [(0, 200, False), (1, 200, False), (2, 200, True), (1, 1, False)])
def test_an_unbounded_attack_may_leave_one_image(left: int, n: int, triggered: bool) -> None:
    finding = unbounded_attack(flags(left, n))
    assert finding.triggered is triggered
    assert finding.tolerance == 1 / n


PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Finding], str, str]] = {
    # rule: the function of (expected to be lower, other), and the names of their accuracies
    "queries_stronger": (queries_stronger, "white_box", "queried"),
    "transfer_stronger": (transfer_stronger, "white_box", "transferred"),
    "iterative_weaker": (lambda many, one: iterative_weaker(one, many), "iterative", "one_step"),
    "not_converged": (not_converged, "fewer_steps", "more_steps"),
    "losses_disagree": (losses_disagree, "cross_entropy", "margin"),
}


def tolerance(p: float, n: int) -> float:
    return max(2 * sqrt(p * (1 - p) / n), 1 / n)


@pytest.mark.parametrize(
    ("expected", "other", "n", "triggered"),
    [
        (50, 40, 100, False),  # two standard errors are exactly 10 images
        (50, 39, 100, True),
        (100, 99, 100, False),  # no standard error at all, but one image is allowed
        (100, 98, 100, True),
        (0, 0, 100, False),
        (1, 0, 100, False),
        (550, 519, 1000, False),
        (550, 518, 1000, True),
        (1, 0, 1, False),
    ],
)
@pytest.mark.parametrize("rule", PAIRS)
def test_an_attack_may_be_two_standard_errors_stronger(
    rule: str, expected: int, other: int, n: int, triggered: bool
) -> None:
    function, name, other_name = PAIRS[rule]
    finding = function(flags(expected, n), flags(other, n))
    assert finding.rule == rule
    assert finding.triggered is triggered
    assert finding.tolerance == pytest.approx(tolerance(expected / n, n))
    assert finding.numbers == {name: expected / n, other_name: other / n, "images": n}
    assert finding.warning is (rule == "not_converged")


@pytest.mark.parametrize("rule", sorted(PAIRS.keys() - {"losses_disagree"}))
def test_an_attack_may_be_as_much_weaker_as_it_likes(rule: str) -> None:
    assert not PAIRS[rule][0](flags(50, 100), flags(90, 100)).triggered


@given(st.integers(1, 400), st.data())
def test_rules_follow_their_definition(n: int, draw: st.DataObject) -> None:
    high, low = (draw.draw(st.integers(0, n)) for _ in range(2))
    for function, _, _ in PAIRS.values():
        finding = function(flags(high, n), flags(low, n))
        a, b = (low, high) if finding.rule == "losses_disagree" and low > high else (high, low)
        # In exact arithmetic: (a - b)^2 > 4 n p (1 - p) with p = a / n, and more than one image.
        assert finding.triggered is (a - b > 1 and (a - b) ** 2 * n > 4 * a * (n - a))


@pytest.mark.parametrize(("cross_entropy", "margin", "triggered"), [(50, 39, True), (39, 50, True), (40, 50, False)])
def test_either_loss_may_be_the_one_that_fails(cross_entropy: int, margin: int, triggered: bool) -> None:
    finding = losses_disagree(flags(cross_entropy, 100), flags(margin, 100))
    assert finding.triggered is triggered
    assert finding.numbers == {"cross_entropy": cross_entropy / 100, "margin": margin / 100, "images": 100}
    assert finding.text.index("margin") < finding.text.index("cross-entropy") or margin > cross_entropy


@pytest.mark.parametrize(
    ("by_eps", "triggered", "pair"),
    [
        ({0.1: 50, 0.2: 40, 0.4: 0}, False, None),
        ({0.1: 50, 0.2: 50}, False, None),
        ({0.1: 50, 0.2: 60}, False, (0.1, 0.2)),  # two standard errors at 0.1 are exactly 10 images
        ({0.1: 50, 0.2: 61}, True, (0.1, 0.2)),
        ({0.4: 61, 0.1: 50}, True, (0.1, 0.4)),  # the order they come in is of no matter
        ({0.1: 70, 0.2: 50, 0.3: 55, 0.4: 61}, True, (0.2, 0.4)),  # not neighbours
        ({0.1: 0, 0.2: 1}, False, (0.1, 0.2)),
        ({0.1: 0, 0.2: 2}, True, (0.1, 0.2)),
        ({0.1: 98, 0.2: 100}, False, (0.1, 0.2)),
    ],
)
def test_accuracy_may_not_rise_with_eps(
    by_eps: dict[float, int], triggered: bool, pair: tuple[float, float] | None
) -> None:
    finding = accuracy_rises({eps: flags(right, 100) for eps, right in by_eps.items()})
    assert finding.triggered is triggered
    if pair:
        low, high = (by_eps[eps] / 100 for eps in pair)
        expected = {"eps": pair[0], "larger_eps": pair[1], "accuracy": low, "accuracy_at_larger_eps": high}
        assert finding.numbers == {**expected, "images": 100}
        assert finding.tolerance == pytest.approx(tolerance(low, 100))


@pytest.mark.parametrize("by_eps", [{}, {0.1: flags(1, 3)}])
def test_one_eps_says_nothing_about_rising(by_eps: dict[float, Tensor]) -> None:
    with pytest.raises(DataError, match="needs two of them"):
        accuracy_rises(by_eps)


@pytest.mark.parametrize(
    ("clean", "noise", "one_step", "triggered"),
    [
        (90, 84, 84, False),  # two standard errors at 0.9 are exactly 6 images: noise does nothing
        (90, 83, 83, True),
        (90, 83, 95, True),
        (90, 83, 82, False),
        (90, 90, 90, False),  # nothing does anything: clean accuracy everywhere
        (90, 45, 45, True),
        (90, 44, 44, False),  # noise that destroys the images
        (90, 0, 0, False),
        (0, 0, 0, False),
        (100, 98, 98, True),
        (100, 99, 99, False),
    ],
)
def test_noise_may_not_be_as_strong_as_a_step(clean: int, noise: int, one_step: int, triggered: bool) -> None:
    finding = noise_as_strong(flags(clean, 100), flags(noise, 100), flags(one_step, 100))
    assert finding.triggered is triggered
    assert finding.numbers == {"clean": clean / 100, "noise": noise / 100, "one_step": one_step / 100, "images": 100}


def distortions(correct: Tensor, *values: float) -> Tensor:
    """The ``values``, repeated, for images that are fooled, else 0."""
    return torch.tensor(values).repeat(len(correct))[: len(correct)] * ~correct


@pytest.mark.parametrize(
    ("white", "queried", "l2", "l2_queried", "triggered"),
    [
        (50, 61, (1.0, 1.1), (0.5, 0.6), True),
        (50, 60, (1.0, 1.1), (0.5, 0.6), False),  # as much accuracy left, two standard errors being 10 images
        (50, 61, (1.0, 1.1), (1.0, 1.1), False),  # as near
        (50, 61, (1.0, 1.1), (2.0, 2.1), False),
        (50, 61, (1.0, 3.0), (2.9, 1.0), False),  # nearer on average by less than two standard errors
        (50, 99, (1.0, 1.1), (0.5, 0.6), False),  # one image in common
        (50, 100, (1.0, 1.1), (0.5, 0.6), False),  # none
        (0, 0, (1.0, 1.1), (0.5, 0.6), False),
    ],
)
def test_zoo_may_not_be_nearer_and_leave_more(
    white: int, queried: int, l2: tuple[float, float], l2_queried: tuple[float, float], triggered: bool
) -> None:
    own, other = flags(white, 100), flags(queried, 100)
    finding = queries_nearer(own, other, distortions(own, *l2), distortions(other, *l2_queried))
    assert finding.triggered is triggered
    assert finding.numbers["white_box"] == white / 100
    assert finding.numbers["l2_images"] == 100 - queried


def test_zoos_successes_on_easy_images_are_not_nearer() -> None:
    """Its own mean is lower, but on the same images it is not."""
    white, queried = flags(0, 100), flags(80, 100)
    hard_first = torch.linspace(2, 1, 100)
    finding = queries_nearer(white, queried, hard_first, torch.where(queried, 0.0, 1.05 * hard_first))
    assert finding.numbers["l2_queried_own_successes"] < finding.numbers["l2_own_successes"]
    assert finding.numbers["l2_queried"] > finding.numbers["l2"]
    assert not finding.triggered


def test_images_wrong_before_have_no_distortion_to_compare() -> None:
    white, queried = flags(50, 100), flags(70, 100)
    moved = torch.where(torch.arange(100) < 90, 1.0, 0.0)
    finding = queries_nearer(white, queried, 2 * moved * ~white, moved * ~queried)
    assert finding.numbers["l2_images"] == 20
    assert finding.triggered


@pytest.mark.parametrize(
    "bad", [torch.ones(9), -torch.ones(10), torch.full((10,), torch.inf), torch.full((10,), torch.nan)]
)
def test_distortions_are_finite_and_one_per_image(bad: Tensor) -> None:
    vector = flags(5, 10)
    for values in ((bad, torch.ones(10)), (torch.ones(10), bad)):
        with pytest.raises(DataError, match="not distortions of the images"):
            queries_nearer(vector, vector, *values)


def test_a_warning_makes_no_verdict() -> None:
    warning = not_converged(flags(90, 100), flags(50, 100))
    assert warning.triggered
    assert warning.warning
    assert verdict([warning, zero_gradients(flags(0, 10))]) == "none"
    assert verdict([warning, zero_gradients(flags(5, 10))]) == "masked"
    with pytest.raises(DataError, match="no masking rule was measured"):
        verdict([warning])


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (zero_gradients(flags(3, 200)), "1.5% of 200 images have"),
        (unbounded_attack(flags(28, 200)), "leaves 14.0% of 200 images"),
        (
            transfer_stronger(flags(70, 100), flags(43, 100)),
            "examples 43.0%, under white-box ones 70.0%",
        ),
        (
            queries_stronger(flags(70, 100), flags(30, 100)),
            "accuracy by queries 30.0%, by gradients 70.0%, on 100 images",
        ),
        (accuracy_rises({0.1: flags(1, 4), 0.2: flags(3, 4)}), "accuracy 25.0% at eps 0.1, 75.0% at eps 0.2, on 4"),
        (iterative_weaker(flags(1, 4), flags(3, 4)), "accuracy under one step 25.0%, under many 75.0%"),
        (not_converged(flags(3, 4), flags(1, 4)), "under more steps 25.0%, under fewer 75.0%"),
        (
            noise_as_strong(flags(4, 4), flags(2, 4), flags(3, 4)),
            "under noise 50.0%, under one step of the gradient 75.0%",
        ),
        (losses_disagree(flags(3, 4), flags(1, 4)), "loss margin 25.0%, through the loss cross-entropy 75.0%"),
        (
            queries_nearer(flags(0, 4), flags(2, 4), torch.full((4,), 2.0), torch.ones(4) * ~flags(2, 4)),
            "ZOO leaves 50.0%, CW-L2 0.0% of 4 images (at most 25.0% more); on the 2 that both fool, mean l2 1 and 2",
        ),
    ],
)
def test_texts_are_one_line_with_the_numbers(finding: Finding, text: str) -> None:
    assert text in finding.text
    assert "\n" not in finding.text


def test_one_triggered_rule_is_enough() -> None:
    fine, bad = zero_gradients(flags(0, 10)), unbounded_attack(flags(5, 10))
    assert verdict([fine]) == "none"
    assert verdict([fine, bad]) == "masked"


def test_nothing_measured_is_no_verdict() -> None:
    with pytest.raises(DataError, match="no masking rule was measured"):
        verdict([])


SINGLE: dict[str, Callable[[Tensor], Finding]] = {
    "zero": zero_gradients,
    "unbounded": unbounded_attack,
    "rises": lambda vector: accuracy_rises({0.1: flags(1, 3), 0.2: vector}),
    "noise": lambda vector: noise_as_strong(flags(1, 3), vector, flags(1, 3)),
    "one step": lambda vector: noise_as_strong(flags(1, 3), flags(1, 3), vector),
    "nearer": lambda vector: queries_nearer(flags(1, 3), vector, torch.ones(3), torch.ones(3)),
    **{rule: partial(function, flags(1, 3)) for rule, (function, _, _) in PAIRS.items()},
}


@pytest.mark.parametrize("rule", SINGLE.values(), ids=SINGLE)
@pytest.mark.parametrize("vector", [torch.zeros(0, dtype=torch.bool), torch.zeros(3), torch.zeros(3, 1).bool()])
def test_rules_take_one_boolean_per_image(rule: Callable[[Tensor], Finding], vector: Tensor) -> None:
    with pytest.raises(DataError, match="one boolean per image"):
        rule(vector)


def test_rules_compare_the_same_images() -> None:
    for function, _, _ in PAIRS.values():
        with pytest.raises(DataError, match=r"about the same images .*expected \d entries, got \d"):
            function(flags(1, 3), flags(1, 4))


def test_a_partly_masked_network_is_found_by_its_share(net: nn.Module, rounded_net: nn.Module, data: Data) -> None:
    """Only bright images pass through the rounding."""

    def partly(images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1, keepdim=True) > 0.5
        return torch.where(bright, rounded_net(images), net(images))

    images, labels = data
    dead = dead_gradients(partly, images, labels, batch_size=40)
    assert torch.equal(dead, images.flatten(1).mean(1) > 0.5)
    assert zero_gradients(dead).triggered


def test_transfer_scores_the_sources_examples_on_the_target(net: nn.Module, ste_net: nn.Module, data: Data) -> None:
    images, labels = data
    made = FGSM()(net, images, labels, THREAT, seed=0).adversarial
    found = transferred_correct(net, ste_net, images, labels, THREAT, seed=0, attack=FGSM())
    assert torch.equal(found, accuracy_vector(ste_net, made, labels))


def test_examples_that_take_all_their_steps_transfer_better(net: nn.Module, ste_net: nn.Module, data: Data) -> None:
    full, short = (
        transferred_correct(net, ste_net, *data, THREAT, seed=0, attack=attack) for attack in (None, PGD(compact=True))
    )
    assert full.sum() < short.sum()


def test_wrong_labels_are_refused_before_gradients_are_taken(net: nn.Module, data: Data) -> None:
    with pytest.raises(DataError, match="label out of range"):
        dead_gradients(net, data[0], data[1] + 3)
