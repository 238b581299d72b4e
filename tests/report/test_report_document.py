"""The report as JSON: round trips, and files that are no reports."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from qopt.errors import UsageError
from qopt.report.model import Report


def test_reports_survive_writing_and_reading(full_report: Report, bare_report: Report) -> None:
    for report in (full_report, bare_report):
        text = report.to_json()
        assert text.endswith("}\n")
        assert Report.from_json(text) == report
        assert Report.from_json(text).to_json() == text


def test_the_file_is_deterministic_and_in_the_order_of_the_fields(full_report: Report) -> None:
    again = Report.model_validate(json.loads(full_report.to_json()))
    assert again.to_json() == full_report.to_json()
    assert list(json.loads(full_report.to_json()))[:4] == ["schema", "verdict", "robust_accuracy", "target"]
    assert json.loads(full_report.to_json())["schema"] == 1


def changed(report: Report, place: list[Any], value: Any) -> str:
    content = json.loads(report.to_json())
    inner = content
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    return json.dumps(content)


WRONG: list[tuple[list[Any], Any, list[str]]] = [
    (["schema"], 2, ["key 'schema'", "should be 1", "got 2"]),
    (["extra"], 1, ["unknown key 'extra'"]),
    (["verdit"], "x", ["unknown key 'verdit'", "did you mean 'verdict'"]),
    (["model", "nmae"], "x", ["unknown key 'model.nmae'", "did you mean 'name'"]),
    (["rows", 0, "clean", "vaule"], 1, ["unknown key 'rows.0.clean.vaule'", "did you mean 'value'"]),
    (["rows", 1, "attacked", "PGD-20", "m"], 1, ["'rows.1.attacked.PGD-20.m'", "one of high, low, n, value"]),
    (["rows", 1, "clean_drop", "standard_eror"], 1, ["did you mean 'standard_error'"]),
    (["layers", 1, "macs"], "640", ["key 'layers.1.macs'", "valid integer", "got '640'"]),
    (["layers", 1, "macs"], 1.5, ["key 'layers.1.macs'", "valid integer"]),
    (["layers", 0, "integer"], 1, ["key 'layers.0.integer'", "valid boolean"]),
    (["size", "ratio"], float("nan"), ["key 'size.ratio'", "finite number"]),
    (["size", "ratio"], None, ["key 'size.ratio'", "got None"]),
    (["seed"], "7", ["key 'seed'", "valid integer"]),
    (["rows", 1, "masking"], "maybe", ["key 'rows.1.masking'", "'none', 'masked' or 'not checked'"]),
    (["gates", 0], "holds", ["key 'gates.0'", "got 'holds'"]),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "words"), WRONG)
def test_what_is_wrong_is_named(full_report: Report, place: list[Any], value: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Report.from_json(changed(full_report, place, value), "out/report.json")
    message = str(caught.value)
    assert message.startswith("out/report.json: ")
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_a_missing_part_is_named(full_report: Report) -> None:
    content = json.loads(full_report.to_json())
    del content["layers"][1]["macs"]
    with pytest.raises(UsageError, match=r"the key 'layers.1.macs' is missing"):
        Report.from_json(json.dumps(content))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_report_holds_no_number_that_json_does_not_have(full_report: Report, number: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Report.model_validate({**full_report.model_dump(by_alias=True), "robust_accuracy": number})


@pytest.mark.parametrize(("holds", "all_hold"), [([], True), ([True, True], True), ([True, False], False)])
def test_gates_hold_together(full_report: Report, holds: list[bool], all_hold: bool) -> None:
    gate = full_report.gates[0]
    gates = [gate.model_copy(update={"holds": value}) for value in holds]
    assert full_report.model_copy(update={"gates": gates}).gates_hold is all_hold
