from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import (
    FGSM,
    PGD,
    Classifier,
    Finding,
    accuracy_vector,
    dead_gradients,
    transfer_stronger,
    transferred_correct,
    unbounded_attack,
    unbounded_correct,
    verdict,
    zero_gradients,
)
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


@pytest.mark.parametrize(
    ("white", "transferred", "n", "triggered"),
    [
        (50, 40, 100, False),  # two standard errors are exactly 10 images
        (50, 39, 100, True),
        (50, 90, 100, False),
        (100, 99, 100, False),  # no standard error at all, but one image is allowed
        (100, 98, 100, True),
        (0, 0, 100, False),
        (550, 519, 1000, False),
        (550, 518, 1000, True),
    ],
)
def test_transfer_may_be_two_standard_errors_stronger(white: int, transferred: int, n: int, triggered: bool) -> None:
    finding = transfer_stronger(flags(white, n), flags(transferred, n))
    assert finding.triggered is triggered
    p = white / n
    assert finding.tolerance == pytest.approx(max(2 * (p * (1 - p) / n) ** 0.5, 1 / n))
    assert finding.numbers == {"white_box": p, "transferred": transferred / n, "images": n}


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (zero_gradients(flags(3, 200)), "1.5% of 200 images have"),
        (unbounded_attack(flags(28, 200)), "leaves 14.0% of 200 images"),
        (
            transfer_stronger(flags(70, 100), flags(43, 100)),
            "examples 43.0%, under white-box ones 70.0%",
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


@pytest.mark.parametrize(
    "rule",
    [zero_gradients, unbounded_attack, lambda vector: transfer_stronger(flags(1, 3), vector)],
    ids=["zero", "unbounded", "transfer"],
)
@pytest.mark.parametrize("vector", [torch.zeros(0, dtype=torch.bool), torch.zeros(3), torch.zeros(3, 1).bool()])
def test_rules_take_one_boolean_per_image(rule: Callable[[Tensor], Finding], vector: Tensor) -> None:
    with pytest.raises(DataError, match="one boolean per image"):
        rule(vector)


def test_rules_compare_the_same_images() -> None:
    with pytest.raises(DataError, match="expected 3 entries, got 4"):
        transfer_stronger(flags(1, 3), flags(1, 4))


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
