"""Targets: what each name stands for, spelled out, and what two of them leave."""

from __future__ import annotations

import pytest

from qopt.errors import UsageError
from qopt.hardware.targets import TARGETS, parse_target
from qopt.limits import Limit
from qopt.plugins import plugins

MIXED = "ternary, int2, int3, int4, int4:max, log4, log4:max, int8"
EXPANSIONS = {
    "int8": "int8: weights int8; activations int8; bits<=8",
    "int4": f"int4: weights {MIXED}; activations int8; bits<=4",
    "int4-uniform": "int4-uniform: weights int4; activations int8; bits<=4",
    "int2": f"int2: weights {MIXED}; activations int8; bits<=2",
    "int4,int4": f"int4,int4: weights {MIXED}; activations int8; bits<=4",
    "int4,int2": f"int4,int2: weights {MIXED}; activations int8; bits<=4, bits<=2",
    "int4,int8": "int4,int8: weights int8; activations int8; bits<=4, bits<=8",
    " int4 , int4-uniform ": "int4,int4-uniform: weights int4; activations int8; bits<=4",
}


@pytest.mark.parametrize(("text", "expansion"), EXPANSIONS.items())
def test_expansions(text: str, expansion: str) -> None:
    assert parse_target(text).expansion == expansion


def test_every_target_is_in_the_table() -> None:
    assert set(TARGETS) == {text for text in EXPANSIONS if "," not in text}
    assert all(target.name == name for name, target in TARGETS.items())


WRONG = [
    ("int3", ["--target: unknown target (got 'int3')", "did you mean 'int"]),
    ("stm32", ["unknown target", "one of int2, int4, int4-uniform, int8"]),
    ("", ["unknown target (got '')"]),
    ("int4,", ["unknown target (got '')"]),
    ("int4 int8", ["unknown target"]),
    ("INT4", ["unknown target"]),
    ("int8,int4-uniform", ["--target: the targets have no weight format in common (got int8,int4-uniform)"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_other_names_are_no_targets(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert [word for word in words if word not in str(caught.value)] == []


def test_an_intersection_does_not_depend_on_the_order() -> None:
    for one in TARGETS:
        for other in TARGETS:
            if {one, other} == {"int8", "int4-uniform"}:
                continue
            first, second = parse_target(f"{one},{other}"), parse_target(f"{other},{one}")
            assert set(first.weights) == set(second.weights)
            assert set(first.limits) == set(second.limits)
            assert first.activations == second.activations


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_can_keep_its_own_limits_and_is_priced(name: str) -> None:
    target = TARGETS[name]
    assert target.limits == (Limit("bits", target.limits[0].bound),)
    assert min(spec.container_bits for spec in target.weights) <= target.limits[0].bound
    assert set(target.cost_models) <= set(plugins("qopt.cost_models"))
