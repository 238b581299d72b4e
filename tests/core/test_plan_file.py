"""The plan file: golden text, round trips, what wrong files say, and which entry wins."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import PlanError
from qopt.plan import Defaults, Plan, uniform
from qopt.spec import ActivationSpec, WeightSpec

LAYERS = ["stem.weight", "block1.conv1.weight", "block1.conv2.weight", "fc.weight"]
TENSORS = ["input", "block1.out", "pool"]

GOLDEN = """{
  "schema": 1,
  "defaults": {
    "weights": "int4",
    "activations": "int8"
  },
  "weights": {
    "block1.*": "log4:tensor",
    "fc.weight": "float"
  },
  "activations": {
    "pool": "int4:p99.9"
  },
  "ranges": {
    "input": [
      0.0,
      1.0
    ]
  },
  "ties": [
    [
      "block1.conv1.weight",
      "block1.conv2.weight"
    ]
  ],
  "rounding": "nearest",
  "bias_correction": true,
  "equalisation": false,
  "model": "ab",
  "data": "",
  "reasons": {
    "fc.weight": "größte Empfindlichkeit"
  }
}
"""


def example() -> Plan:
    return Plan(
        defaults=Defaults(weights="int4:mse", activations="int8:minmax"),
        weights={"block1.*": "log4:mse:tensor", "fc.weight": "float"},
        activations={"pool": "int4:p99.90"},
        ranges={"input": (0, 1)},
        ties=[["block1.conv1.weight", "block1.conv2.weight"]],
        bias_correction=True,
        model="ab",
        reasons={"fc.weight": "größte Empfindlichkeit"},
    )


def test_the_golden_file() -> None:
    assert example().to_json() == GOLDEN
    assert Plan.from_json(GOLDEN) == example()
    assert Plan.from_json(GOLDEN).to_json() == GOLDEN


def test_an_empty_object_is_the_float_plan() -> None:
    plan = Plan.from_json("{}")
    assert plan == uniform() == Plan()
    assert set(map(str, plan.weight_specs(LAYERS).values())) == {"float"}
    assert set(map(str, plan.activation_specs(TENSORS).values())) == {"float"}


names = st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable())
weights = st.sampled_from(
    ["int4", "log2:tensor", "int8:max", "float", "log8:tensor:max", "int4:block32", "ternary:block8:max", "int4:asym",
     "int2:block64:max:asym"]
)  # fmt: skip
activations = st.sampled_from(["int8", "int4:p99.9", "float"])
bounds = st.tuples(
    st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False)
).map(lambda pair: (min(pair), max(pair)))
plans = st.builds(
    Plan,
    defaults=st.builds(Defaults, weights=weights, activations=activations),
    weights=st.dictionaries(names, weights, max_size=4),
    activations=st.dictionaries(names, activations, max_size=4),
    ranges=st.dictionaries(names, bounds, max_size=3),
    ties=st.lists(st.lists(names, max_size=3), max_size=2),
    rounding=st.sampled_from(["nearest", "gptq"]),
    bias_correction=st.booleans(),
    model=names,
    data=names,
    reasons=st.dictionaries(names, names, max_size=2),
)


@settings(max_examples=150)
@given(plans)
def test_plans_survive_writing_and_reading(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.weights) == list(plan.weights)
    assert (again.digest, again.to_json()) == (plan.digest, plan.to_json())


WRONG: list[tuple[str, list[str]]] = [
    ("", ["not valid JSON"]),
    ("{", ["not valid JSON", "line 1"]),
    ("weights: int4", ["not valid JSON"]),
    ("\ufeff{}", ["not valid JSON"]),
    ("[" * 100_000, ["not valid JSON"]),
    ('{"schema": 1,}', ["not valid JSON", "trailing comma"]),
    ("[]", ["no JSON object"]),
    ("3", ["no JSON object"]),
    ("null", ["no JSON object"]),
    ('{"schema": 2}', ["key 'schema'", "should be 1", "got 2"]),
    ('{"schema": "1"}', ["key 'schema'", "should be 1", "got '1'"]),
    ('{"schema_": 1}', ["unknown key 'schema_'", "did you mean 'schema'"]),
    ('{"wieghts": {}}', ["unknown key 'wieghts'", "did you mean 'weights'"]),
    ('{"defaults": {"weigths": "int4"}}', ["unknown key 'defaults.weigths'", "did you mean 'weights'"]),
    ('{"defaults": {"ties": []}}', ["unknown key 'defaults.ties'", "one of activations, weights"]),
    ('{"defaults": "int4"}', ["key 'defaults'", "should be an object", "got 'int4'"]),
    ('{"defaults": {"weights": "int9"}}', ["key 'defaults.weights'", "not a weight format", "'int9'"]),
    ('{"defaults": {"activations": "log4"}}', ["key 'defaults.activations'", "not an activation format"]),
    ('{"weights": ["int4"]}', ["key 'weights'", "got ['int4']"]),
    ('{"weights": {"fc.weight": 4}}', ["key 'weights.fc.weight'", "valid string", "got 4"]),
    ('{"weights": {"fc.weight": "int4:row"}}', ["key 'weights.fc.weight'", "unknown or repeated option"]),
    ('{"weights": {"fc.weight": null}}', ["key 'weights.fc.weight'", "got None"]),
    ('{"activations": {"pool": "int0"}}', ["key 'activations.pool'", "not an activation format"]),
    ('{"ranges": {"pool": [1, 0]}}', ["key 'ranges.pool'", "upside down", "got [1.0, 0.0]"]),
    ('{"ranges": {"pool": [NaN, 1]}}', ["key 'ranges.pool.0'", "finite number", "got nan"]),
    ('{"ranges": {"pool": [0, Infinity]}}', ["key 'ranges.pool.1'", "finite number"]),
    ('{"ranges": {"pool": [0, 1e999]}}', ["key 'ranges.pool.1'", "finite number"]),
    ('{"ranges": {"pool": ["0", 1]}}', ["key 'ranges.pool.0'", "valid number", "got '0'"]),
    ('{"ranges": {"pool": [true, 1]}}', ["key 'ranges.pool.0'", "valid number", "got True"]),
    ('{"ranges": {"pool": [0]}}', ["the key 'ranges.pool.1' is missing"]),
    ('{"ranges": {"pool": [0, 1, 2]}}', ["key 'ranges.pool'", "at most 2 items"]),
    ('{"ranges": {"pool": 3}}', ["key 'ranges.pool'", "got 3"]),
    ('{"ties": ["a"]}', ["key 'ties.0'", "got 'a'"]),
    ('{"ties": [[1]]}', ["key 'ties.0.0'", "got 1"]),
    ('{"rounding": "upwards"}', ["key 'rounding'", "'nearest', 'gptq' or 'adaround'", "got 'upwards'"]),
    ('{"bias_correction": "yes"}', ["key 'bias_correction'", "got 'yes'"]),
    ('{"bias_correction": 1}', ["key 'bias_correction'", "got 1"]),
    ('{"model": 7}', ["key 'model'", "got 7"]),
    ('{"weights": {"a": "int4", "a": "int8"}}', ["the key 'a' is there twice"]),
    ('{"weights": {}, "ties": [], "weights": {"a": "int4"}}', ["the key 'weights' is there twice"]),
    ('{"weights": {"a": "' + "x" * 5000 + '"}}', ["key 'weights.a'", "not a weight format"]),
    ('{"ties": "' + "x" * 5000 + '"}', ["key 'ties'", "xxx..."]),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[text[:40] for text, _ in WRONG])
def test_a_wrong_file_is_one_line_that_says_where(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, "my/plan.json")
    message = str(caught.value)
    assert message.startswith("my/plan.json: ")
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_is_a_plan_error_or_still_a_plan(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(GOLDEN) - 1))
    end = data.draw(st.integers(start, len(GOLDEN)))
    damaged = GOLDEN[:start] + data.draw(st.text(alphabet='{}[]",:0aé\x00-', max_size=3)) + GOLDEN[end:]
    try:
        plan = Plan.from_json(damaged)
    except PlanError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert Plan.from_json(plan.to_json()) == plan


def specs(plan: Plan) -> list[str]:
    return [str(spec) for spec in plan.weight_specs(LAYERS).values()]


RESOLVED: list[tuple[dict[str, str], list[str]]] = [
    ({}, ["int8", "int8", "int8", "int8"]),
    ({"fc.weight": "log4"}, ["int8", "int8", "int8", "log4"]),
    ({"*": "int4"}, ["int4", "int4", "int4", "int4"]),
    ({"block1.*": "int4"}, ["int8", "int4", "int4", "int8"]),
    ({"*.conv?.weight": "int4"}, ["int8", "int4", "int4", "int8"]),
    ({"*.conv[1].weight": "int4"}, ["int8", "int4", "int8", "int8"]),
    ({"*": "int4", "fc.weight": "float"}, ["int4", "int4", "int4", "float"]),
    ({"fc.weight": "float", "*": "int4"}, ["int4", "int4", "int4", "int4"]),
    ({"block1.*": "int4", "*.conv2.*": "int2"}, ["int8", "int4", "int2", "int8"]),
    ({"*.conv2.*": "int2", "block1.*": "int4"}, ["int8", "int4", "int4", "int8"]),
]


@pytest.mark.parametrize(("entries", "expected"), RESOLVED)
def test_a_later_entry_overrides_an_earlier_one(entries: dict[str, str], expected: list[str]) -> None:
    plan = uniform(WeightSpec.parse("int8")).with_changes(weights=entries)
    assert specs(plan) == expected
    assert specs(Plan.from_json(plan.to_json())) == expected


def test_layers_come_back_in_the_network_order() -> None:
    plan = Plan(weights=dict.fromkeys(reversed(LAYERS), "int4"))
    assert list(plan.weight_specs(LAYERS)) == LAYERS


def test_a_layer_whose_name_looks_like_a_glob_is_taken_by_its_name() -> None:
    plan = Plan(weights={"layers[0].weight": "int4"})
    found = plan.weight_specs(["layers[0].weight", "layers0.weight"])
    assert [str(spec) for spec in found.values()] == ["int4", "float"]


def test_globs_tell_capital_letters_apart() -> None:
    with pytest.raises(PlanError, match="the plan names a layer"):
        Plan(weights={"FC.*": "int4"}).weight_specs(LAYERS)


UNKNOWN: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"weights": {"fc.wieght": "int4"}}, "weights", ["fc.wieght: ", "a layer", "did you mean 'fc.weight'"]),
    ({"weights": {"block9.*": "int4"}}, "weights", ["block9.*: ", "a layer"]),
    ({"weights": {"*": "int4", "stem": "int4"}}, "weights", ["stem: ", "'stem.weight'"]),
    ({"activations": {"poool": "int4"}}, "activations", ["poool: ", "a tensor", "'pool'"]),
    ({"activations": {"x*": "int4"}}, "activations", ["x*: ", "one of block1.out, input, pool"]),
    ({"ranges": {"inptu": (0, 1)}}, "activations", ["inptu: ", "a tensor", "'input'"]),
    ({"ties": [["fc.weight", "fd.weight"]]}, "weights", ["fd.weight: ", "a tied layer", "'fc.weight'"]),
    (
        {"ties": [["fc.weight", "stem.weight"]], "weights": {"fc.weight": "int4"}},
        "weights",
        ["fc.weight: tied layers must share one format", "fc.weight int4, stem.weight float", "same spec"],
    ),
]


@pytest.mark.parametrize(("fields", "part", "words"), UNKNOWN)
def test_what_matches_nothing_is_named(fields: dict[str, Any], part: str, words: list[str]) -> None:
    plan = Plan(**fields)
    with pytest.raises(PlanError) as caught:
        plan.weight_specs(LAYERS) if part == "weights" else plan.activation_specs(TENSORS)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_tie_that_holds_passes() -> None:
    plan = Plan(ties=[["fc.weight", "stem.weight"]], weights={"fc.*": "int4:mse", "stem.*": "int4:channel"})
    assert specs(plan)[0] == specs(plan)[3] == "int4"


CHANGES: list[dict[str, Any]] = [
    {"defaults": {"weights": "int8", "activations": "int8"}},
    {"defaults": {"weights": "int4", "activations": "int4"}},
    {"weights": {"block1.*": "log4:tensor"}},
    {"weights": {"fc.weight": "float", "block1.*": "log4:tensor"}},
    {"activations": {}},
    {"ranges": {"input": (0.0, 1.0000001)}},
    {"ties": []},
    {"rounding": "gptq"},
    {"bias_correction": False},
    {"equalisation": True},
    {"model": ""},
    {"data": "cd"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees_every_change(change: dict[str, Any]) -> None:
    assert example().with_changes(**change).digest != example().digest


def test_every_field_that_can_change_is_in_the_table() -> None:
    fields = {field.alias or name for name, field in Plan.model_fields.items()}
    assert fields - {key for change in CHANGES for key in change} == {"schema", "reasons"}


def test_the_digest_does_not_see_reasons_nor_spelling() -> None:
    plan = example()
    assert plan.with_changes(reasons={"fc.weight": "another"}).digest == plan.digest
    assert plan.with_changes(activations={"pool": "int4:p99.9000"}).digest == plan.digest
    ranges = {"a": (0.0, 1.0), "b": (0.0, 2.0)}
    one, other = plan.with_changes(ranges=ranges), plan.with_changes(ranges=dict(reversed(ranges.items())))
    assert one.digest == other.digest


def test_globs_in_another_order_are_another_plan() -> None:
    one = Plan(weights={"*": "int4", "fc.weight": "int8"})
    other = Plan(weights={"fc.weight": "int8", "*": "int4"})
    assert specs(one) != specs(other)
    assert one.digest != other.digest


def test_the_digest_is_fixed_forever() -> None:
    assert example().digest == "3ad79fa15faba96b0952e443e32153333b8c7e42cc15d9fc013d300e81fe7fc7"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"fc.weight": "int9"}}, ["key 'weights.fc.weight'", "not a weight format"]),
        ({"ranges": {"x": (2, 1)}}, ["key 'ranges.x'", "upside down"]),
        ({"ranges": {"x": (float("nan"), 1)}}, ["key 'ranges.x.0'", "finite"]),
        ({"rounding": "up"}, ["key 'rounding'"]),
        ({"layers": {}}, ["unknown key 'layers'"]),
    ],
)
def test_a_change_is_checked_like_a_file(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        example().with_changes(**change)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_plan_cannot_be_assigned_to() -> None:
    with pytest.raises(ValueError, match="frozen"):
        example().model = "x"


def test_a_uniform_plan_has_one_format_of_each_kind() -> None:
    plan = uniform(WeightSpec.parse("log4:max"), ActivationSpec(4, 99.5), model="ab")
    assert set(specs(plan)) == {"log4:max"}
    assert {str(spec) for spec in plan.activation_specs(TENSORS).values()} == {"int4:p99.5"}
    assert plan.model == "ab"
