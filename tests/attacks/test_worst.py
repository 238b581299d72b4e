from __future__ import annotations

import pytest
import torch

from qopt.attacks import AttackResult, worst_case
from qopt.attacks.worst import worst_of
from qopt.errors import DataError


def result(value: float, fooled: list[bool]) -> AttackResult:
    return AttackResult(torch.full((len(fooled), 1, 2, 2), value), torch.tensor(fooled))


def test_the_first_that_fooled_else_the_first() -> None:
    results = [
        result(0.1, [False, True, False, False]),
        result(0.2, [False, True, True, False]),
        result(0.3, [False, False, True, True]),
    ]
    worst = worst_of(results)
    assert worst.fooled.tolist() == [False, True, True, True]
    assert worst.adversarial[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert torch.equal(worst.correct, worst_case([r.correct for r in results]))


def test_one_is_its_own_worst_and_a_copy() -> None:
    one = result(0.5, [True, False])
    worst = worst_of([one])
    assert torch.equal(worst.adversarial, one.adversarial)
    worst.adversarial.zero_()
    worst.fooled.zero_()
    assert one.adversarial.min() == 0.5
    assert one.fooled.any()


@pytest.mark.parametrize("results", [[], [result(0, [True]), result(0, [True, False])]], ids=["none", "lengths"])
def test_what_does_not_match_has_no_worst(results: list[AttackResult]) -> None:
    with pytest.raises(DataError, match="all on the same images"):
        worst_of(results)
