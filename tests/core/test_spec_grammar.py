"""The words for formats: what parses to what, what does not, and how it is written back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import PlanError
from qopt.plan import Plan
from qopt.spec import FLOAT, FLOAT_ACTIVATION, ActivationSpec, WeightSpec

WEIGHTS: list[tuple[str, WeightSpec, str]] = [
    ("float", FLOAT, "float"),
    ("int8", WeightSpec("int", 8), "int8"),
    ("int1", WeightSpec("int", 1), "int1"),
    ("log4", WeightSpec("log", 4), "log4"),
    ("int4:channel", WeightSpec("int", 4), "int4"),
    ("int4:mse", WeightSpec("int", 4), "int4"),
    ("int4:channel:mse", WeightSpec("int", 4), "int4"),
    ("int4:tensor", WeightSpec("int", 4, "tensor"), "int4:tensor"),
    ("int4:max", WeightSpec("int", 4, "channel", "max"), "int4:max"),
    ("log2:max:tensor", WeightSpec("log", 2, "tensor", "max"), "log2:tensor:max"),
    ("log2:tensor:max", WeightSpec("log", 2, "tensor", "max"), "log2:tensor:max"),
    ("  int3\n", WeightSpec("int", 3), "int3"),
    ("ternary", WeightSpec("ternary", 2), "ternary"),
    ("ternary:max:tensor", WeightSpec("ternary", 2, "tensor", "max"), "ternary:tensor:max"),
    ("int4:auto", WeightSpec("int", 4), "int4"),
    ("int4:narrow", WeightSpec("int", 4, grid="narrow"), "int4:narrow"),
    ("int8:full:mse:tensor", WeightSpec("int", 8, "tensor", "mse", "full"), "int8:tensor:full"),
    ("int2:channel:mid", WeightSpec("int", 2, grid="mid"), "int2:mid"),
    ("nf@4", WeightSpec("nf", 4), "nf@4"),
    ("my_grid2@3:tensor:max", WeightSpec("my_grid2", 3, "tensor", "max"), "my_grid2@3:tensor:max"),
    ("int4:block32", WeightSpec("int", 4, "block", block=32), "int4:block32"),
    ("int1:block8", WeightSpec("int", 1, "block", block=8), "int1:block8"),
    ("ternary:max:block1024", WeightSpec("ternary", 2, "block", "max", block=1024), "ternary:block1024:max"),
    ("log4:block64:max", WeightSpec("log", 4, "block", "max", block=64), "log4:block64:max"),
    ("nf@4:block9", WeightSpec("nf", 4, "block", block=9), "nf@4:block9"),
    ("int3:mid:mse:block100", WeightSpec("int", 3, "block", "mse", "mid", block=100), "int3:block100:mid"),
    ("int4:asym", WeightSpec("int", 4, grid="asym"), "int4:asym"),
    ("int8:channel:asym:mse", WeightSpec("int", 8, grid="asym"), "int8:asym"),
    ("int2:tensor:asym", WeightSpec("int", 2, "tensor", grid="asym"), "int2:tensor:asym"),
    ("int5:asym:max", WeightSpec("int", 5, "channel", "max", "asym"), "int5:max:asym"),
    ("int4:block32:asym", WeightSpec("int", 4, "block", grid="asym", block=32), "int4:block32:asym"),
    ("int4:asym:max:block32", WeightSpec("int", 4, "block", "max", "asym", block=32), "int4:block32:max:asym"),
]


@pytest.mark.parametrize(("text", "spec", "written"), WEIGHTS)
def test_weight_formats_parse(text: str, spec: WeightSpec, written: str) -> None:
    assert WeightSpec.parse(text) == spec
    assert str(spec) == written


NO_WEIGHTS = [
    "", " ", "int", "int0", "int9", "int16", "log0", "log9", "INT4", "Int4", "int-4", "int 4", "int4.0", "uint4", "4",
    "float32", "float16", "float:max", "int4:", "int4::max", "int4:max:", "int4:max:max", "int4:tensor:channel",
    "int4:mse:max", "int4:tensor:max:tensor", "int4:row", "int4:MAX", "int4;max", "int4,int8", "int4\x00", "int４",
    "int4:p99", "none", "ternary2", "ternary4", "ternary:mid", "ternary:full", "log4:full", "log4:auto", "int1:mid",
    "int5:mid", "int8:mid", "int4:max:full", "int4:narrow:max", "int4:max:auto", "int4:full:mid", "int4:narrow:narrow",
    "int@4", "log@4", "ternary@2", "linear@4", "binary@1", "nf@0", "nf@9", "nf@44", "@4", "nf@", "nf4", "NF@4", "n-f@4",
    "4f@4", "nf@4:mid", "nf@4:auto", "float:tensor",
    "int4:block", "int4:block0", "int4:block7", "int4:block1025", "int4:block1030", "int4:block2000", "int4:block032",
    "int4:block-8", "int4:block 32", "int4:block32:block32", "int4:block32:block64", "int4:channel:block32", "int4:32",
    "int4:block32:tensor", "float:block32", "int4:blocks32", "int4:block3２", "int4:BLOCK32", "block32",
    "int4:block32:max:full", "int4:block32:max:max", "int1:asym", "ternary:asym", "log4:asym", "nf@4:asym",
    "float:asym",
    "int4:asym:asym", "int4:asym:mid", "int4:full:asym", "int4:auto:asym", "int4:asym:max:mse", "int9:asym", "asym",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_WEIGHTS)
def test_other_words_are_no_weight_formats(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        WeightSpec.parse(text)
    message = str(caught.value)
    assert "weight format" in message
    assert "expected" in message
    assert "\n" not in message
    assert repr(text) in message or " ".join(repr(text).split()) in message


ACTIVATIONS: list[tuple[str, ActivationSpec, str]] = [
    ("float", FLOAT_ACTIVATION, "float"),
    ("int8", ActivationSpec(8), "int8"),
    ("int2", ActivationSpec(2), "int2"),
    ("int1", ActivationSpec(1), "int1"),
    ("int8:minmax", ActivationSpec(8), "int8"),
    ("int4:mse", ActivationSpec(4, calibrator="mse"), "int4:mse"),
    ("int8:entropy", ActivationSpec(8, calibrator="entropy"), "int8:entropy"),
    ("int1:clip1", ActivationSpec(1, calibrator="clip1"), "int1:clip1"),
    ("int4:clip6", ActivationSpec(4, calibrator="clip6"), "int4:clip6"),
    ("int8:p100", ActivationSpec(8), "int8"),
    ("int4:p99.9", ActivationSpec(4, 99.9), "int4:p99.9"),
    ("int4:p99", ActivationSpec(4, 99.0), "int4:p99"),
    ("int4:p99.0", ActivationSpec(4, 99.0), "int4:p99"),
    ("int4:p50.1", ActivationSpec(4, 50.1), "int4:p50.1"),
    ("int4:p99.99999", ActivationSpec(4, 99.99999), "int4:p99.99999"),
    (" int5 ", ActivationSpec(5), "int5"),
]


@pytest.mark.parametrize(("text", "spec", "written"), ACTIVATIONS)
def test_activation_formats_parse(text: str, spec: ActivationSpec, written: str) -> None:
    assert ActivationSpec.parse(text) == spec
    assert str(spec) == written


NO_ACTIVATIONS = [
    "", "int0", "int9", "int16", "log4", "int8:", "int8:p", "int8:p50", "int8:p0", "int8:p9", "int8:p101", "int8:p-99",
    "int8:p99.", "int8:pnan", "int8:99", "int8:minmax:p99", "int8:max", "int8:tensor", "float:p99", "INT8",
    "int8:p99,9", "int8:p٩٩", "int8:mse:p99", "int8:percentile", "int8:kl", "int8:MSE", "int4:clip", "int4:clip2",
    "float:mse", "int4:clip1:mse", "int4:pmse",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_ACTIVATIONS)
def test_other_words_are_no_activation_formats(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        ActivationSpec.parse(text)
    assert "not an activation format" in str(caught.value)
    assert repr(text) in str(caught.value)


weight_specs = st.one_of(
    st.just(FLOAT),
    st.builds(
        WeightSpec,
        st.sampled_from(["int", "log", "nf"]),
        st.integers(1, 8),
        st.sampled_from(["channel", "tensor"]),
        st.sampled_from(["mse", "max"]),
    ),
    st.builds(
        WeightSpec,
        st.just("int"),
        st.integers(2, 4),
        st.sampled_from(["channel", "tensor"]),
        st.just("mse"),
        st.sampled_from(["auto", "narrow", "full", "mid"]),
    ),
    st.builds(
        WeightSpec,
        st.sampled_from(["int", "log", "nf"]),
        st.integers(1, 8),
        st.just("block"),
        st.sampled_from(["mse", "max"]),
        block=st.integers(8, 1024),
    ),
    st.builds(
        WeightSpec,
        st.just("int"),
        st.integers(2, 8),
        st.sampled_from(["channel", "tensor"]),
        st.sampled_from(["mse", "max"]),
        st.just("asym"),
    ),
    st.builds(
        WeightSpec,
        st.just("int"),
        st.integers(2, 4),
        st.just("block"),
        st.just("mse"),
        st.sampled_from(["auto", "narrow", "full", "mid", "asym"]),
        block=st.integers(8, 1024),
    ),
    st.builds(WeightSpec, st.just("ternary"), st.just(2), st.sampled_from(["channel", "tensor"])),
)
percentiles = st.floats(50, 100, exclude_min=True)
calibrators = st.sampled_from(["mse", "entropy", "clip1", "clip6"])
activation_specs = st.one_of(
    st.just(FLOAT_ACTIVATION),
    st.builds(ActivationSpec, st.integers(1, 8), percentiles),
    st.builds(ActivationSpec, st.integers(1, 8), st.just(100.0), calibrators),
)


@given(weight_specs)
def test_weight_formats_survive_writing_and_reading(spec: WeightSpec) -> None:
    assert WeightSpec.parse(str(spec)) == spec
    assert spec.short == str(spec).split(":")[0]


@settings(max_examples=300)
@given(activation_specs)
def test_activation_formats_survive_writing_and_reading(spec: ActivationSpec) -> None:
    assert ActivationSpec.parse(str(spec)) == spec


@settings(max_examples=300)
@given(st.text(alphabet="intlogfea1248:p.max sryd@bck", max_size=16))
def test_any_text_parses_or_is_a_plan_error(text: str) -> None:
    for parse in (WeightSpec.parse, ActivationSpec.parse):
        try:
            written = str(parse(text))
        except PlanError:
            continue
        assert str(parse(written)) == written


PATTERNS = Plan.model_json_schema()["properties"]


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("weights", [text for text, _, _ in WEIGHTS], NO_WEIGHTS),
        ("activations", [text for text, _, _ in ACTIVATIONS], NO_ACTIVATIONS),
    ],
)
def test_the_published_pattern_is_the_grammar(key: str, right: list[str], wrong: list[str]) -> None:
    pattern = re.compile(PATTERNS[key]["additionalProperties"]["pattern"].removesuffix("$") + r"\Z", re.ASCII)
    assert [text for text in right if not pattern.match(text.strip())] == []
    assert [text for text in wrong if pattern.match(text) and text != "int8:p50"] == []


@pytest.mark.parametrize(
    ("text", "container"),
    [("int1", 1), ("log1", 1), ("ternary", 1.6), ("int2", 2), ("int2:mid", 2), ("int3", 3), ("log3", 3), ("log4", 4),
     ("int5", 8), ("int8", 8), ("int4:block32", 4), ("int2:asym", 2), ("ternary:block8", 1.6),
     ("int6:asym", 8), ("nf@4", 4), ("nf@6", 8), ("float", 32)],
)  # fmt: skip
def test_containers(text: str, container: float) -> None:
    found = WeightSpec.parse(text).container_bits
    assert found == container
    assert str(found) == str(container)  # as reports print it


def test_which_quantizer_a_format_asks_for() -> None:
    words = {
        "int4": "linear",
        "int1": "binary",
        "log1": "binary",
        "log2": "log",
        "ternary:max": "ternary",
        "nf@1": "nf",
    }
    assert {text: WeightSpec.parse(text).quantizer for text in words} == words


def test_specs_are_ordered_and_hashable() -> None:
    specs = [spec for _, spec, _ in WEIGHTS]
    assert len(set(specs)) == len({str(spec) for spec in specs})
    words = ["int4:narrow", "int4", "ternary", "int2:mid", "int4:full"]
    assert [str(s) for s in sorted(map(WeightSpec.parse, words))] == [
        "int2:mid", "int4", "int4:full", "int4:narrow", "ternary",
    ]  # fmt: skip


def test_only_float_is_float() -> None:
    assert [t for t, spec, _ in WEIGHTS if spec.is_float] == ["float"]
    assert [t for t, spec, _ in ACTIVATIONS if spec.is_float] == ["float"]


def test_activation_formats_are_ordered() -> None:
    specs = [ActivationSpec.parse(text) for text in ("int8", "int4:mse", "int8:entropy", "int4", "int4:p99", "float")]
    assert [str(spec) for spec in sorted(specs)] == ["int4:p99", "int4:mse", "int4", "int8:entropy", "int8", "float"]


@pytest.mark.parametrize("calibrator", ["mse", "entropy", "clip1", "clip6"])
def test_a_percentile_belongs_to_its_calibrator(calibrator: Any) -> None:
    with pytest.raises(PlanError, match="only the calibrator percentile takes a percentile"):
        ActivationSpec(4, 99.0, calibrator)


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "block"},
        {"granularity": "block", "block": 7},
        {"granularity": "block", "block": 1025},
        {"granularity": "block", "block": -8},
        {"granularity": "channel", "block": 32},
        {"granularity": "tensor", "block": 32},
    ],
)
def test_a_block_belongs_to_its_granularity(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="not a number of weights that share a scale"):
        WeightSpec("int", 4, **fields)


@pytest.mark.parametrize("row", ["int4:block32", "int4:asym", "ternary:block8", "int8:max:asym", "log4:block64:max"])
def test_a_row_has_neither_blocks_nor_zero_points(row: str) -> None:
    with pytest.raises(PlanError, match="not a weight format with rows"):
        WeightSpec.parse(f"rows({row}*2,int8)")
    with pytest.raises(PlanError, match="a row of its own cannot have"):
        WeightSpec.of_rows([WeightSpec.parse(row), WeightSpec("int", 8)])


def test_which_formats_are_asymmetric() -> None:
    words = ["int4", "int4:asym", "int2:block8:max:asym", "int1", "ternary", "int4:full", "float", "nf@4"]
    assert [word for word in words if WeightSpec.parse(word).asymmetric] == ["int4:asym", "int2:block8:max:asym"]
    assert not WeightSpec.parse("int4:asym").full_range
