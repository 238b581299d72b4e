"""Plans as text: golden, and a diff that names what differs and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.plan import Defaults, Plan
from qopt.plan_text import diff_plans, show_plan

FULL = Plan(
    defaults=Defaults(weights="int8", activations="int8"),
    weights={"conv1": "int4", "fc.*": "log4:max", "conv2": "rows(int8*3,ternary*12,int8)"},
    activations={"image": "float"},
    ranges={"relu": (0.0, 5.25), "image": (-1.0, 1.0)},
    ties=[["conv1", "conv3"]],
    rounding="gptq", bias_correction=True, model="ab" * 32,
    reasons={"conv1": "best by divergence"},
)  # fmt: skip


def test_everything_is_shown() -> None:
    assert show_plan(FULL).replace(FULL.digest[:12], "DIGEST") == (
        """defaults  weights int8, activations int8
rounding  gptq, bias correction
model     abababababab
images    none
digest    DIGEST

weights
  conv1  int4                          best by divergence
  fc.*   log4:max
  conv2  rows: 4 x int8, 12 x ternary

activations
  relu   int8   0 to 5.25
  image  float  -1 to 1

ties
  conv1, conv3
"""
    )


def test_an_empty_plan_is_short() -> None:
    lines = show_plan(Plan()).splitlines()
    assert [line.split()[0] for line in lines] == ["defaults", "rounding", "model", "images", "digest"]
    assert "any" in lines[2]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"reasons": {"conv1": "another"}}, []),
        ({"rounding": "nearest"}, ["- rounding  gptq", "+ rounding  nearest"]),
        ({"bias_correction": False}, ["- bias_correction  True", "+ bias_correction  False"]),
        ({"model": ""}, [f"- model  {'ab' * 32}", "+ model  (empty)"]),
        ({"ties": []}, ["- ties  [['conv1', 'conv3']]", "+ ties  (empty)"]),
        (
            {"defaults": {"weights": "int4", "activations": "int8"}},
            ["- defaults.weights  int8", "+ defaults.weights  int4"],
        ),
        (
            {"weights": {"conv1": "int3", "fc.*": "log4:max", "conv2": "rows(int8*3,ternary*12,int8)"}},
            ["- weights.conv1  int4", "+ weights.conv1  int3"],
        ),
        (
            {"weights": {"conv1": "int4", "fc.*": "log4:max"}},
            ["- weights.conv2  rows(int8*3,ternary*12,int8)"],
        ),
        (
            {"weights": {"fc.*": "log4:max", "conv1": "int4", "conv2": "rows(int8*3,ternary*12,int8)"}},
            ["~ weights: the order of globs differs, and later ones override earlier ones"],
        ),
        ({"ranges": {"relu": (0.0, 6.0), "image": (-1.0, 1.0)}}, ["- ranges.relu  0 to 5.25", "+ ranges.relu  0 to 6"]),
        ({"activations": {"image": "float", "add": "int4"}}, ["+ activations.add  int4"]),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], lines: list[str]) -> None:
    assert diff_plans(FULL, FULL.with_changes(**changes)).splitlines() == lines


formats = st.sampled_from(["int4", "int8", "log4", "ternary", "float"])
plans = st.builds(
    Plan,
    weights=st.dictionaries(st.sampled_from(["a", "b", "c*"]), formats, max_size=3),
    rounding=st.sampled_from(["nearest", "gptq"]),
    bias_correction=st.booleans(),
)


@given(plans, plans)
def test_no_difference_means_that_they_quantize_alike(old: Plan, new: Plan) -> None:
    assert diff_plans(old, old) == ""
    if not diff_plans(old, new):
        names = ["a", "b", "c1"]
        assert old.model_copy(update={"weights": {}}) == new.model_copy(update={"weights": {}})
        assert old.weight_specs(names) == new.weight_specs(names)


@given(plans, plans)
def test_turned_around_it_says_the_opposite(old: Plan, new: Plan) -> None:
    there, back = (sorted(diff_plans(a, b).splitlines()) for a, b in ((old, new), (new, old)))
    swapped = sorted(line.translate(str.maketrans("+-", "-+", "")) if line[0] in "+-" else line for line in back)
    assert there == swapped
