"""The options of a run: defaults, what is refused, and the plain values that the manifest keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qopt.config import Options, parse_baseline
from qopt.errors import PlanError, UsageError
from qopt.limits import ROBUST_GATES, Gate, Limit

WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"calibration_images": 0}, ["--calibration-images: must be at least 1", "got 0"]),
    ({"probe_images": -1}, ["--probe-images: must be at least 1", "got -1"]),
    ({"attack_images": 0}, ["--attack-images: must be at least 1"]),
    ({"threshold": 0.0}, ["--threshold: must be positive"]),
    ({"threshold": -1.0}, ["--threshold: must be positive"]),
    ({"threshold": float("nan")}, ["--threshold: must be positive and finite", "got nan"]),
    ({"threshold": float("inf")}, ["--threshold: must be positive and finite"]),
    ({"norm": "l1"}, ["--norm: unknown word", "linf, l2", "got 'l1'"]),
    ({"thresholds": "weigthed"}, ["--thresholds: unknown word", "weighted", "got 'weigthed'"]),
    ({"bias_correction": "yes"}, ["--bias-correction: unknown word", "auto, on, off"]),
    ({"calibration": "adv"}, ["--calibration: unknown word", "clean, adversarial, mixed", "got 'adv'"]),
    ({"baselines": ("int4", "int9")}, ["--baseline: not a weight format", "'int9'"]),
    ({"baselines": ("int4@log4",)}, ["--baseline: not an activation format", "'log4'"]),
    ({"activations": "log4"}, ["--activations: not an activation format"]),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_wrong_values_name_their_option(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**fields)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("options", "gates"),
    [
        (Options(), ()),
        (Options(robust=True), ROBUST_GATES),
        (Options(robust=True, gates=()), ()),
        (Options(gates=(Gate("clean_drop", 1.0),)), (Gate("clean_drop", 1.0),)),
        (Options(robust=True, gates=(Gate("masking"),)), (Gate("masking"),)),
    ],
)
def test_gates_that_decide(options: Options, gates: tuple[Gate, ...]) -> None:
    assert options.active_gates == gates


@pytest.mark.parametrize(
    ("text", "weights", "activations"),
    [("int4:max", "int4:max", "int8"), ("int8@int4", "int8", "int4"), ("float@float", "float", "float")],
)
def test_baselines(text: str, weights: str, activations: str) -> None:
    assert tuple(map(str, parse_baseline(text))) == (weights, activations)


@pytest.mark.parametrize("text", ["", "@int8", "int4@int8@int8", "int4 int8"])
def test_wrong_baselines(text: str) -> None:
    with pytest.raises(PlanError):
        parse_baseline(text)


def test_the_manifest_gets_plain_values() -> None:
    options = Options(robust=True, limits=(Limit("flash", 2 * 1024**2),), mean=(0.5,), std=(0.25,), eps=0.1)
    plain = json.loads(json.dumps(options.as_dict()))
    assert plain["limits"] == ["flash<=2097152"]
    assert plain["gates"] == ["clean_drop<=2", "robust_drop<=2", "masking=none"]
    assert (plain["mean"], plain["eps"], plain["baselines"]) == ([0.5], 0.1, ["int4:max"])
    assert set(plain) == set(Options.__dataclass_fields__)
