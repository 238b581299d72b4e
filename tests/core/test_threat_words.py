"""The threat model: what eps may be written as, what is refused, and how it is printed."""

from __future__ import annotations

from typing import Any

import pytest

from qopt.config import resolve_options
from qopt.errors import UsageError
from qopt.threat import ThreatModel, check_declared, default_threat, parse_eps

EPS = [
    ("0.1", 0.1),
    ("8/255", 8 / 255),
    (" 8 / 255 ", 8 / 255),
    ("0", 0.0),
    ("0/255", 0.0),
    ("1", 1.0),
    ("1e-3", 0.001),
    (".5", 0.5),
    ("2.5/255", 2.5 / 255),
    ("1/3", 1 / 3),
]


@pytest.mark.parametrize(("text", "value"), EPS)
def test_eps_parses(text: str, value: float) -> None:
    assert parse_eps(text) == value


@pytest.mark.parametrize(
    "text", ["", " ", "eight", "8/", "/255", "8/0", "8//255", "8/255/1", "0x10", "0,1", "8:255", "1 2", "--1"]
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_eps(text)
    assert str(caught.value) == f"--eps: eps is not a number (expected 0.1 or 8/255, got {text!r})"


@pytest.mark.parametrize("text", ["-0.1", "-8/255", "8/-255", "nan", "inf", "-inf", "1e999", "nan/2", "1e999999999999"])
def test_what_is_no_radius_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--eps: eps must be a finite number, zero or larger"):
        parse_eps(text)


@pytest.mark.parametrize(
    ("threat", "written"),
    [
        (ThreatModel(), "linf 8/255"),
        (ThreatModel("linf", 1 / 255), "linf 1/255"),
        (ThreatModel("linf", 31 / 255), "linf 31/255"),
        (ThreatModel("linf", 32 / 255), "linf 0.12549"),
        (ThreatModel("linf", 0.1), "linf 0.1"),
        (ThreatModel("linf", 0.0), "linf 0"),
        (ThreatModel("linf", 2.5 / 255), "linf 0.00980392"),
        (ThreatModel("linf", 1.0), "linf 1"),
        (ThreatModel("l2", 0.5), "l2 0.5"),
        (ThreatModel("l2", 8 / 255), "l2 0.0313725"),
    ],
)
def test_printed(threat: ThreatModel, written: str) -> None:
    assert str(threat) == written


@pytest.mark.parametrize("pixels", range(1, 32))
def test_whole_pixels_survive_printing_and_parsing(pixels: int) -> None:
    threat = ThreatModel("linf", pixels / 255)
    norm, eps = str(threat).split()
    assert ThreatModel(norm, parse_eps(eps)) == threat  # type: ignore[arg-type]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"norm": "l1"}, "--norm: unknown norm (expected linf or l2, got 'l1')"),
    ({"norm": "Linf"}, "--norm: unknown norm (expected linf or l2, got 'Linf')"),
    ({"eps": -0.1}, "--eps: eps must be a finite number, zero or larger (got -0.1)"),
    ({"eps": float("nan")}, "--eps: eps must be a finite number, zero or larger (got nan)"),
    ({"eps": float("inf")}, "--eps: eps must be a finite number, zero or larger (got inf)"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_other_threats_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ThreatModel(**fields)
    assert str(caught.value) == message


def test_a_radius_in_grey_values_is_refused_where_it_is_declared() -> None:
    with pytest.raises(UsageError) as caught:
        check_declared("linf", 8.0)
    assert str(caught.value) == (
        "--eps: a linf radius above 1 allows any image, pixels are in [0, 1] (got 8); give 8/255 if that is in grey "
        "values"
    )
    for norm, eps in (("linf", 1.0), ("l2", 8.0), ("linf", None), ("l2", 0.0)):
        check_declared(norm, eps)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="finite number"):
        check_declared("l2", float("nan"))


@pytest.mark.parametrize("words", [{"eps": 8}, {"eps": "8"}, {"eps": 1.5, "norm": "linf"}])
def test_the_main_job_refuses_it(words: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"give .*/255"):
        resolve_options(**words)


@pytest.mark.parametrize(("channels", "written"), [(1, "linf 0.1"), (3, "linf 8/255"), (784, "linf 8/255")])
def test_defaults(channels: int, written: str) -> None:
    assert str(default_threat(channels)) == written
