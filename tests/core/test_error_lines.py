"""The exception tree: one line each, an exit code for the shell, and hints that name what exists."""

from __future__ import annotations

import pickle

import pytest

import qopt.errors as errors
from qopt.errors import (
    CorruptModelError,
    DataError,
    InfeasibleError,
    InterruptedRunError,
    ModelError,
    PlanError,
    PluginError,
    QoptError,
    UnsafeModelError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
    nearest,
)

EXIT_CODES: list[tuple[type[QoptError], int]] = [
    (QoptError, 4),
    (UsageError, 2),
    (DataError, 2),
    (PlanError, 2),
    (InfeasibleError, 2),
    (ModelError, 3),
    (CorruptModelError, 3),
    (UnsafeModelError, 3),
    (UnsupportedModelError, 3),
    (PluginError, 4),
    (VerificationError, 4),
    (InterruptedRunError, 130),
]


@pytest.mark.parametrize(("kind", "code"), EXIT_CODES)
def test_every_class_has_its_exit_code(kind: type[QoptError], code: int) -> None:
    assert kind("x").exit_code == code


def test_the_table_and_the_docstring_know_every_class() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == {kind for kind, _ in EXIT_CODES}
    assert [kind.__name__ for kind in defined if kind.__name__ not in (errors.__doc__ or "")] == []


LINES = [
    ({}, "it broke"),
    ({"where": "a.onnx"}, "a.onnx: it broke"),
    ({"expected": "3"}, "it broke (expected 3)"),
    ({"got": "4"}, "it broke (got 4)"),
    ({"where": "n", "expected": "3", "got": "4", "fix": "try 3"}, "n: it broke (expected 3, got 4); try 3"),
    ({"got": "first\n  second\tthird"}, "it broke (got first second third)"),
    ({"fix": ""}, "it broke"),
]


@pytest.mark.parametrize(("fields", "line"), LINES)
def test_a_message_is_one_line(fields: dict[str, str], line: str) -> None:
    assert str(UsageError("it broke", **fields)) == line


@pytest.mark.parametrize(
    ("inner", "line"), [("key 'x'", "plan.json: key 'x': wrong (got 1)"), (None, "plan.json: wrong (got 1)")]
)
def test_at_puts_the_outer_place_first(inner: str | None, line: str) -> None:
    error = PlanError("wrong", where=inner, got="1").at("plan.json")
    assert type(error) is PlanError
    assert str(error) == line


def test_errors_survive_the_way_between_processes() -> None:
    error = PlanError("wrong", where="key", expected="a", got="b", fix="c")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.where, copy.fix) == (PlanError, str(error), "key", "c")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("conv1.wieght", ["conv1.weight", "fc.bias"], "did you mean 'conv1.weight'?"),
        ("layer1", ["layer2", "layer3"], "did you mean 'layer3' or 'layer2'?"),
        ("zzz", ["a", "b"], "one of a, b"),
        ("zzz", [], "there are none"),
        ("zzz", [f"layer{i:02}" for i in range(20)], "for example layer00, layer01, layer02"),
        ("", ["a"], "one of a"),
    ],
)
def test_hints_name_what_exists(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
    assert nearest(name, reversed(known)) == hint
