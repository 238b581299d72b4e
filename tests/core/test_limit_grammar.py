"""Limits and gates as users write them, and as reports write them back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import UsageError
from qopt.limits import QUANTITIES, ROBUST_GATES, Gate, Limit, Quantity, parse_gate, parse_limit

LIMITS: list[tuple[str, Limit, str]] = [
    ("bits<=3.5", Limit("bits", 3.5), "bits<=3.5"),
    ("bits<=4", Limit("bits", 4.0), "bits<=4"),
    (" bits  <= 4.0 ", Limit("bits", 4.0), "bits<=4"),
    ("bits<=0", Limit("bits", 0.0), "bits<=0"),
    ("size<=1000", Limit("size", 1000.0), "size<=1000"),
    ("size<=1000B", Limit("size", 1000.0), "size<=1000"),
    ("flash<=512KB", Limit("flash", 524288.0), "flash<=524288"),
    ("flash<=2MB", Limit("flash", 2097152.0), "flash<=2097152"),
    ("flash<=1.5 MB", Limit("flash", 1572864.0), "flash<=1572864"),
    ("sram<=384KB", Limit("sram", 393216.0), "sram<=393216"),
    ("latency<=5ms", Limit("latency", 0.005), "latency<=0.005s"),
    ("latency<=2s", Limit("latency", 2.0), "latency<=2s"),
    ("latency<=50us", Limit("latency", 5e-05), "latency<=5e-05s"),
    ("energy<=3mJ", Limit("energy", 0.003), "energy<=0.003J"),
    ("energy<=1e-3J", Limit("energy", 0.001), "energy<=0.001J"),
    ("lipschitz<=120", Limit("lipschitz", 120.0), "lipschitz<=120"),
    ("bits<=+3", Limit("bits", 3.0), "bits<=3"),
]


@pytest.mark.parametrize(("text", "limit", "written"), LIMITS)
def test_limits_parse(text: str, limit: Limit, written: str) -> None:
    assert parse_limit(text) == limit
    assert str(limit) == written


WRONG_LIMITS: list[tuple[str, list[str]]] = [
    ("", ["not a limit", 'like "bits<=3.5"']),
    ("bits", ["not a limit"]),
    ("bits<=", ["not a limit"]),
    ("<=3", ["not a limit"]),
    ("bits<3", ["not a limit"]),
    ("bits=3", ["not a limit"]),
    ("bits>=3", ["not a limit"]),
    ("bits<=three", ["not a limit"]),
    ("bits<=3<=4", ["not a limit"]),
    ("BITS<=3", ["not a limit"]),
    ("bits<=3,flash<=2MB", ["not a limit"]),
    ("bit<=3", ["unknown quantity", "'bit'", "did you mean 'bits'"]),
    ("kilograms<=3", ["unknown quantity", "one of bits, "]),
    ("bits<=3KB", ["wrong unit for bits", "expected no unit", "got 'KB'"]),
    ("flash<=3GB", ["wrong unit for flash", "no unit or B or KB or MB"]),
    ("flash<=3kb", ["wrong unit for flash"]),
    ("latency<=5", ["wrong unit for latency", "s or ms or us", "got ''"]),
    ("energy<=5W", ["wrong unit for energy"]),
    ("bits<=-1", ["finite and not negative"]),
    ("bits<=1e999", ["finite and not negative"]),
    ("flash<=1e308MB", ["finite and not negative"]),
    ("bits<=1.2.3", ["not a number"]),
    ("bits<=e", ["not a number"]),
    ("bits<=+", ["not a number"]),
    ("bits<=1e", ["not a number"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG_LIMITS)
def test_other_words_are_no_limits(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_limit(text)
    message = str(caught.value)
    assert message.startswith("--limit: ")
    assert [word for word in words if word not in message] == []


quantities: st.SearchStrategy[Quantity] = st.sampled_from(list(QUANTITIES))


@settings(max_examples=300)
@given(quantities, st.floats(0, 1e300))
def test_a_limit_can_be_copied_from_a_report(quantity: Quantity, bound: float) -> None:
    limit = Limit(quantity, bound)
    assert parse_limit(str(limit)) == limit


GATES: list[tuple[str, Gate, str]] = [
    ("clean_drop<=2", Gate("clean_drop", 2.0), "clean_drop<=2"),
    (" robust_drop <= 1.25 ", Gate("robust_drop", 1.25), "robust_drop<=1.25"),
    ("clean_drop<=0", Gate("clean_drop", 0.0), "clean_drop<=0"),
    ("masking=none", Gate("masking"), "masking=none"),
    ("masking = none", Gate("masking"), "masking=none"),
]


@pytest.mark.parametrize(("text", "gate", "written"), GATES)
def test_gates_parse(text: str, gate: Gate, written: str) -> None:
    assert parse_gate(text) == gate
    assert str(gate) == written


WRONG_GATES: list[tuple[str, list[str]]] = [
    ("", ["not a gate"]),
    ("clean_drop", ["not a gate"]),
    ("clean_drop>=2", ["not a gate"]),
    ("clean_drop<2", ["not a gate"]),
    ("clean_drop<=2%", ["not a gate"]),
    ("clean<=2", ["unknown gate", "'clean_drop'"]),
    ("cleandrop<=2", ["unknown gate", "did you mean 'clean_drop'"]),
    ("clean_drop=2", ["bounded from above", "clean_drop<=..."]),
    ("masking<=none", ["one form", "masking=none"]),
    ("masking=some", ["one form"]),
    ("masking=0", ["one form"]),
    ("clean_drop<=none", ["not a number"]),
    ("clean_drop<=nan", ["finite and not negative"]),
    ("clean_drop<=inf", ["finite and not negative"]),
    ("clean_drop<=-2", ["finite and not negative"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG_GATES)
def test_other_words_are_no_gates(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    message = str(caught.value)
    assert message.startswith("--gate: ")
    assert [word for word in words if word not in message] == []


@given(st.sampled_from(["clean_drop", "robust_drop"]), st.floats(0, 1e300))
def test_a_gate_can_be_copied_from_a_report(name: str, bound: float) -> None:
    assert parse_gate(str(Gate(name, bound))) == Gate(name, bound)


def test_the_gates_of_robust() -> None:
    assert list(map(str, ROBUST_GATES)) == ["clean_drop<=2", "robust_drop<=2", "masking=none"]
    assert tuple(parse_gate(str(gate)) for gate in ROBUST_GATES) == ROBUST_GATES
