"""The published JSON Schemas: up to date, and what the models write is what they allow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qopt.api import optimize
from qopt.job.bundle import Bundle
from qopt.plan import Plan
from qopt.report.model import Report
from qopt.report.schemas import schema, schema_files

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "schemas"


def test_the_published_files_are_up_to_date() -> None:
    found = {path.name: path.read_text() for path in PUBLISHED.iterdir()}
    assert found == schema_files(), "write qopt.report.schemas.schema_files() into docs/schemas again"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The embedded example, without images: seconds, and every layer of the plan and the report is there."""
    return optimize(ROOT / "examples" / "fashion_resnet.pt")


def problems(value: Any, rule: dict[str, Any], root: dict[str, Any], place: str = "") -> list[str]:
    """A validator of the part of JSON Schema that our schemas use; it refuses keywords that it does not know."""
    known = {
        "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "enum", "items",
        "maxItems", "minItems", "pattern", "prefixItems", "properties", "required", "title", "type",
    }  # fmt: skip
    assert set(rule) <= known, f"unknown keyword {set(rule) - known}"
    if "$ref" in rule:
        return problems(value, root["$defs"][rule["$ref"].removeprefix("#/$defs/")], root, place)
    if "anyOf" in rule:
        found = [problems(value, option, root, place) for option in rule["anyOf"]]
        return [] if any(not few for few in found) else found[0]
    if "const" in rule and value != rule["const"]:
        return [f"{place}: not {rule['const']}"]
    if "enum" in rule and value not in rule["enum"]:
        return [f"{place}: not one of {rule['enum']}"]
    if not TYPES[rule["type"]](value):
        return [f"{place}: no {rule['type']}"]
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return [f"{place}: not like {rule['pattern']}"]
    if isinstance(value, list):
        return _array(value, rule, root, place)
    return _object(value, rule, root, place) if isinstance(value, dict) else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": _number,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def _array(value: list[Any], rule: dict[str, Any], root: dict[str, Any], place: str) -> list[str]:
    if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
        return [f"{place}: {len(value)} items"]
    rules = rule.get("prefixItems", [rule.get("items", {})] * len(value))
    return [p for i, (v, r) in enumerate(zip(value, rules, strict=True)) for p in problems(v, r, root, f"{place}.{i}")]


def _object(value: dict[str, Any], rule: dict[str, Any], root: dict[str, Any], place: str) -> list[str]:
    found = [f"{place}: lacks {key}" for key in rule.get("required", []) if key not in value]
    properties, more = rule.get("properties", {}), rule.get("additionalProperties", True)
    for key, item in value.items():
        if key in properties or isinstance(more, dict):
            found += problems(item, properties.get(key, more), root, f"{place}.{key}")
        elif not more:
            found.append(f"{place}: unknown {key}")
    return found


def check(name: str, text: str) -> list[str]:
    rule = schema(name)
    return problems(json.loads(text), rule, rule)


def test_the_embedded_example_is_valid(bundle: Bundle) -> None:
    files = bundle.files()
    assert len(bundle.report.layers) == len(bundle.plan.weights) > 5
    assert check("plan", files["plan.json"].decode()) == []
    assert check("report", files["report.json"].decode()) == []
    assert Plan.from_json(files["plan.json"].decode()) == bundle.plan
    assert Report.from_json(files["report.json"].decode()) == bundle.report


def test_full_and_bare_reports_are_valid(full_report: Report, bare_report: Report) -> None:
    assert check("report", full_report.to_json()) == []
    assert check("report", bare_report.to_json()) == []


WRONG_PLANS = [
    ('{"schema": 2}', ".schema: not 1"),
    ('{"wieghts": {}}', ": unknown wieghts"),
    ('{"weights": {"a": "int9"}}', ".weights.a: not like"),
    ('{"weights": {"a": "int4:max:max"}}', ".weights.a: not like"),
    ('{"defaults": {"activations": "int0"}}', ".defaults.activations: not like"),
    ('{"ranges": {"a": [1]}}', ".ranges.a: 1 items"),
    ('{"ranges": {"a": [1, "2"]}}', ".ranges.a.1: no number"),
    ('{"ties": ["a"]}', ".ties.0: no array"),
    ('{"rounding": "up"}', ".rounding: not one of ['nearest', 'gptq', 'adaround']"),
    ('{"bias_correction": 1}', ".bias_correction: no boolean"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_PLANS)
def test_the_schema_refuses_what_the_reader_refuses(text: str, message: str) -> None:
    assert check("plan", text)[0].startswith(message)
    with pytest.raises(Exception, match="plan: "):
        Plan.from_json(text)


def test_the_schema_of_the_report_is_closed(full_report: Report) -> None:
    content = json.loads(full_report.to_json())
    content["layers"][0]["extra"] = 1
    del content["layers"][1]["macs"]
    assert check("report", json.dumps(content)) == [".layers.0: unknown extra", ".layers.1: lacks macs"]


@pytest.mark.parametrize("name", ["plan", "report"])
def test_an_independent_validator_agrees(name: str, bundle: Bundle) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema(name))
    jsonschema.validate(json.loads(bundle.files()[f"{name}.json"]), schema(name))
