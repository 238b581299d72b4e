"""Formats with one format per output channel: their words, their numbers, and what they cost."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import PlanError, UsageError
from qopt.plan import Plan
from qopt.size import Stored, code_bits, order_width, stored_bits, stored_bytes, table_bytes, tables
from qopt.spec import FLOAT, WEIGHT_PATTERN, WeightSpec

INT8, INT4, INT2, TERNARY = (WeightSpec.parse(text) for text in ("int8", "int4", "int2", "ternary"))
ROW_FORMATS = [f"int{bits}" for bits in range(1, 9)] + [f"log{bits}" for bits in range(1, 5)]
ROW_FORMATS += [
    "ternary",
    "int4:mid",
    "int2:narrow",
    "int8:full",
    "int3:max",
    "ternary:max",
    "log3:max",
    "nf@4",
    "nf@1",
]

runs = st.lists(st.tuples(st.sampled_from(ROW_FORMATS), st.integers(1, 40)), min_size=1, max_size=12)


def text_of(drawn: list[tuple[str, int]]) -> str:
    return "rows(" + ",".join(f"{spec}*{count}" for spec, count in drawn) + ")"


def expanded(spec: WeightSpec) -> list[WeightSpec]:
    return [row for row, count in spec.rows for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "rows", "written"),
    [
        ("rows(int8*3,ternary*12,int4,int2*5)", ((INT8, 3), (TERNARY, 12), (INT4, 1), (INT2, 5)), None),
        ("rows(int4)", ((INT4, 1),), None),
        ("rows(int4*1)", ((INT4, 1),), "rows(int4)"),
        (" rows(int4,int2)\n", ((INT4, 1), (INT2, 1)), "rows(int4,int2)"),
        ("rows(int4,int4*2,int4:channel:mse)", ((INT4, 4),), "rows(int4*4)"),
        ("rows(int4:auto*2,int2,int2,int4)", ((INT4, 2), (INT2, 2), (INT4, 1)), "rows(int4*2,int2*2,int4)"),
        ("rows(int4:mid*2,int4:max)", ((replace(INT4, grid="mid"), 2), (replace(INT4, scale="max"), 1)), None),
        ("rows(nf@4*7,log4)", ((WeightSpec("nf", 4), 7), (WeightSpec("log", 4), 1)), None),
    ],
)
def test_words(text: str, rows: Any, written: str | None) -> None:
    spec = WeightSpec.parse(text)
    assert spec.rows == rows
    assert str(spec) == (written or text)
    assert (spec.kind, spec.short, spec.granularity, spec.is_float) == ("rows", "rows", "channel", False)
    assert spec.channels == sum(count for _, count in rows)
    assert spec.bits == max(row.bits for row, _ in rows)
    assert re.fullmatch(WEIGHT_PATTERN, text.strip())


WRONG = [
    "rows", "rows()", "rows(", "rows)", "rows(int4", "rowsint4)", "rows(int4)x", "rows(int4))", "rows((int4)",
    "rows(,)",
    "rows(int4,)", "rows(,int4)", "rows(int4,,int4)", "rows(int4*0)", "rows(int4*-1)", "rows(int4*)", "rows(int4*01)",
    "rows(int4*2*2)", "rows(int4*1.5)", "rows(int4*１)", "rows(4*int4)", "rows(int4 *2)", "rows(int4, int2)",
    "rows(float)", "rows(float*2,int4)", "rows(int4:tensor)", "rows(int4,int2:tensor*3)", "rows(log5)", "rows(log8*2)",
    "rows(nf@5)", "rows(nf@8)", "rows(rows(int4))", "rows(int4):max", "rows(int4)*2", "rows(int9)",
    "rows(int4:max:full)",
    "rows(int5:mid)", "rows(int4:max:max)", "rows(rows@4)", "rows@4", "rows4", "ROWS(int4)", "rows(int4*10000000)",
    "rows(int4)\nrows(int4)", "int4*3", "int4,int4", "(int4)",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_other_words_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        WeightSpec.parse(text)
    assert "weight format" in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_error_names_the_run_that_is_wrong() -> None:
    with pytest.raises(PlanError, match=r"got 'int9\*4' in 'rows\(int4,int9\*4\)'"):
        WeightSpec.parse("rows(int4,int9*4)")
    with pytest.raises(PlanError, match=r"key 'weights\.a': not a weight format with rows"):
        Plan.from_json('{"schema": 1, "weights": {"a": "rows(int4*)"}}')


def test_the_published_pattern_is_the_grammar() -> None:
    pattern = Plan.model_json_schema()["properties"]["weights"]["additionalProperties"]["pattern"]
    exact = re.compile(pattern.removesuffix("$") + r"\Z", re.ASCII)
    assert [text for text in WRONG if exact.match(text)] == []
    assert exact.match("rows(int8*3,ternary*12,int4,nf@4:max*2)")


def test_a_long_text_that_ends_badly_is_refused_at_once() -> None:
    """Formats that two branches of the pattern take would be tried in 2**5000 ways."""
    start = time.perf_counter()
    for word in ("int4:max", "int2", "ternary*3", "int4:full:channel", "nf@4"):
        assert re.fullmatch(WEIGHT_PATTERN, "rows(" + f"{word}," * 5000 + "x") is None
        with pytest.raises(PlanError):
            WeightSpec.parse("rows(" + f"{word}," * 5000)
    assert time.perf_counter() - start < 5


@settings(max_examples=200)
@given(runs)
def test_text_and_list_say_the_same(drawn: list[tuple[str, int]]) -> None:
    spec = WeightSpec.parse(text_of(drawn))
    channels = [WeightSpec.parse(text) for text, count in drawn for _ in range(count)]
    assert expanded(spec) == channels
    assert WeightSpec.parse(str(spec)) == spec
    assert str(WeightSpec.parse(str(spec))) == str(spec)
    made = WeightSpec.of_rows(channels)
    assert made == (spec if len(set(channels)) > 1 else channels[0])
    assert all(one[0] != other[0] for one, other in zip(spec.rows, spec.rows[1:], strict=False))
    assert len({spec, WeightSpec.parse(str(spec))}) == 1


@settings(max_examples=100)
@given(runs)
def test_members_are_the_channels(drawn: list[tuple[str, int]]) -> None:
    spec = WeightSpec.parse(text_of(drawn))
    channels = expanded(spec)
    members = spec.row_members
    assert sorted(channel for chosen in members.values() for channel in chosen) == list(range(spec.channels))
    assert all(channels[channel] == row for row, chosen in members.items() for channel in chosen)
    assert all(chosen == sorted(chosen) for chosen in members.values())
    assert {row: len(chosen) for row, chosen in members.items()} == spec.row_counts
    assert list(members) == list(spec.row_counts) == list(dict.fromkeys(channels))


def test_all_rows_alike_are_the_format_itself() -> None:
    assert WeightSpec.of_rows([INT4] * 3) == INT4
    assert WeightSpec.of_rows([FLOAT]) == FLOAT
    assert WeightSpec.of_rows([INT4, INT2, INT2]) == WeightSpec.parse("rows(int4,int2*2)")
    assert WeightSpec.parse("rows(int4*3)") != INT4, "what was written is kept: it also says how many channels"


@pytest.mark.parametrize("row", ["float", "int4:tensor", "log5", "nf@6", "rows(int4,int2)"])
def test_rows_that_no_kernel_takes(row: str) -> None:
    with pytest.raises(PlanError, match="that a row of its own cannot have"):
        WeightSpec.of_rows([INT4, WeightSpec.parse(row)])


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "rows", "bits": 4}, {"kind": "int", "bits": 4, "rows": ((INT4, 1),)},
        {"kind": "rows", "bits": 4, "rows": ((INT4, 0),)}, {"kind": "rows", "bits": 4, "rows": ((INT4, 1), (INT4, 2))},
        {"kind": "rows", "bits": 8, "rows": ((INT4, 1),)}, {"kind": "rows", "bits": 4, "rows": ((INT4, 10**7),)},
        {"kind": "rows", "bits": 4, "granularity": "tensor", "rows": ((INT4, 1),)},
        {"kind": "rows", "bits": 4, "grid": "mid", "rows": ((INT4, 1),)},
    ],
)  # fmt: skip
def test_no_two_ways_to_write_one_format(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"of_rows"):
        WeightSpec(**fields)
    with pytest.raises(PlanError, match=r"of_rows"):
        WeightSpec.of_rows([])


def test_rows_have_no_packing_of_their_own() -> None:
    with pytest.raises(UsageError, match="rows of several formats share no packing"):
        _ = WeightSpec.parse("rows(int4,int2)").packing


@pytest.mark.parametrize(
    ("text", "bits"),
    [("rows(int4*3)", "4"), ("rows(int2,int4)", "3"), ("rows(int1*3,int2)", "1.25"), ("rows(int5,int8)", "8"),
     ("rows(ternary*5,int8*5)", "4.8")],
)  # fmt: skip
def test_container_bits_are_the_average(text: str, bits: str) -> None:
    assert str(WeightSpec.parse(text).container_bits) == bits


def test_rows_are_ordered_and_plans_keep_them() -> None:
    texts = ["rows(int4,int2)", "int4", "rows(int2*3)", "float", "rows(int4,int2*2)"]
    assert [str(spec) for spec in sorted(map(WeightSpec.parse, texts))] == [
        "float", "int4", "rows(int2*3)", "rows(int4,int2)", "rows(int4,int2*2)",
    ]  # fmt: skip
    plan = Plan(weights={"a": "rows(int4:auto,int4,int2)", "b": "int4"})
    assert plan.weights["a"] == "rows(int4*2,int2)"
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.weight_specs(["a", "b"])["a"].channels == 3
    assert plan.digest != Plan(weights={"a": "rows(int4*2,int2*2)", "b": "int4"}).digest


def test_cost_by_hand() -> None:
    """12 channels of 10 weights: 3 at 8 bits, 5 ternary, 4 at 4 bits, in an order that has to be stored or not."""
    sorted_rows = Stored(120, 12, WeightSpec.parse("rows(int8*3,ternary*5,int4:narrow*4)"))
    mixed = Stored(120, 12, WeightSpec.parse("rows(int8*2,ternary*5,int4:narrow*4,int8)"))
    codes, scales = 30 + 10 + 20, 12 * 4
    assert (sorted_rows.code_bytes, sorted_rows.bytes) == (codes, codes + scales)
    assert (mixed.code_bytes, mixed.bytes) == (codes, codes + scales + 12)
    assert sorted_rows.code_bits == mixed.code_bits == 30 * 8 + 50 * 1.6 + 40 * 4
    assert code_bits([mixed]) == pytest.approx((30 * 8 + 50 * 1.6 + 40 * 4) / 120)
    ternary = 4 + 4 * 5 + 3
    assert tables(mixed.spec) == tables(TERNARY)
    assert stored_bytes([mixed]) == mixed.bytes + ternary
    assert stored_bytes([mixed, Stored(7, 1, TERNARY)]) == mixed.bytes + ternary + 2 + 4
    assert stored_bits([mixed]) == 8 * (mixed.bytes + ternary) / 120


def test_each_part_fills_its_last_byte_by_itself() -> None:
    one = Stored(3 * 3, 3, WeightSpec.parse("rows(int4,int4:max,int4:full)"))
    assert one.code_bytes == 3 * 2
    assert Stored(9, 3, INT4).code_bytes == 5


@pytest.mark.parametrize(
    ("channels", "width"), [(3, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (1_000_000, 4)]
)  # fmt: skip
def test_the_order_takes_the_smallest_type(channels: int, width: int) -> None:
    assert order_width(channels) == width
    stored = Stored(channels, channels, WeightSpec.parse(f"rows(int4,int8*{channels - 2},int4)"))
    assert stored.bytes == stored.code_bytes + 4 * channels + width * channels
    assert [part.order_bytes for part in stored.parts] == [width * channels, 0]


@settings(max_examples=100)
@given(runs, st.integers(1, 50))
def test_the_parts_are_the_whole(drawn: list[tuple[str, int]], fan_in: int) -> None:
    spec = WeightSpec.parse(text_of(drawn))
    stored = Stored(spec.channels * fan_in, spec.channels, spec)
    assert sum(part.weights for part in stored.parts) == stored.weights
    assert sum(part.channels for part in stored.parts) == stored.channels
    assert sum(part.bytes for part in stored.parts) == stored.bytes
    assert stored_bytes([stored]) == stored_bytes(stored.parts) == stored.bytes + table_bytes(spec)
    assert code_bits([stored]) == code_bits(stored.parts) == pytest.approx(float(spec.container_bits))
    assert all(part.parts == (part,) for part in stored.parts)
    assert stored_bytes([Stored(0, 0, spec)]) == table_bytes(spec), "as search counts tables"
    assert max(map(table_bytes, spec.row_counts)) <= table_bytes(spec) <= sum(map(table_bytes, spec.row_counts))
