"""The report of an analysis: JSON, schema and terminal, from one made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qopt.errors import UsageError
from qopt.report.analysis_report import (
    Activity,
    AnalysisReport,
    Bound,
    CandidateFacts,
    Correlation,
    LayerFacts,
    Measured,
    Range,
    show_analysis,
)
from qopt.report.schemas import schema


def exactly(value: float) -> Bound:
    return Bound(lower=value, upper=value, method="gram")


def candidate(name: str, *, measured: bool, paper: float = 0.5, weighted: bool = True) -> CandidateFacts:
    change = Measured(robust_loss=0.125, robust_error=0.01, adversarial_loss=-1.5, clean_loss=0.0625, divergence=0.25)
    return CandidateFacts(
        format=name, bytes=1234, norm_wq=exactly(2.2), norm_dw=exactly(0.15), paper=paper, relative=0.075,
        weighted=exactly(0.0421) if weighted and measured else None, measured=change if measured else None,
    )  # fmt: skip


def layer(name: str, *, measured: bool, **changes: Any) -> LayerFacts:
    side = Activity(range=Range(low=-1.5, high=2.5), amplification=0.375)
    facts = LayerFacts(
        name=name, op="Conv", shape=[4, 2, 3, 3], weights=72, macs=12345, groups=1, reshaped=exactly(2.0),
        operator_l2=Bound(lower=3.0, upper=3.25, method="frequencies"), operator_linf=exactly(7.0), threshold_wq=2.2,
        threshold_dw=0.3, weight_range=Range(low=-0.5, high=0.75), input=side if measured else None,
        output=side.model_copy(update={"amplification": None}) if measured else None,
        candidates=[candidate("int4", measured=measured), candidate("log4:max", measured=measured, paper=1.5)],
    )  # fmt: skip
    return facts.model_copy(update=changes)


def made(*, measured: bool) -> AnalysisReport:
    second = layer("second", measured=measured, operator_l2=None, operator_linf=None)
    second = second.model_copy(update={"candidates": [candidate("int4", measured=measured, weighted=False)]})
    ranked = [
        Correlation(quantity=quantity, format=name, pairs=3, paper=-0.5, relative=0.25, weighted=None)
        for quantity in ("robust_loss", "divergence")
        for name in ("int4", "")
    ]  # fmt: skip
    facts: dict[str, Any] = {"threat": None, "norm": None, "eps": None, "images": 0, "clean_loss": None}
    facts |= {"adversarial_loss": None, "robust_loss": None, "correlations": []}
    if measured:
        facts = {"threat": "linf 0.1", "norm": "linf", "eps": 0.1, "images": 64, "clean_loss": 0.5, "robust_loss": 0.75}
        facts |= {"adversarial_loss": 2.5, "correlations": ranked}
    return AnalysisReport(
        verdict="net: a sentence.", model="net", digest="ab" * 32, formats=["int4", "log4:max"], seed=3,
        layers=[layer("first", measured=measured), second], notes=["how to read it"], **facts,
    )  # fmt: skip


@pytest.fixture
def full() -> AnalysisReport:
    return made(measured=True)


@pytest.fixture
def bare() -> AnalysisReport:
    return made(measured=False)


def rows(text: str, title: str) -> list[list[str]]:
    """The table under a title, split at two spaces and more."""
    after = text[text.index(title) :].split("\n")
    start = next(i for i, line in enumerate(after) if line.startswith("  "))
    table = []
    for line in after[start:]:
        if not line.startswith("  "):
            break
        table.append([cell for cell in line.strip().split("  ") if cell])
    return [[cell.strip() for cell in row] for row in table]


@pytest.mark.parametrize("measured", [True, False])
def test_json_reads_back_and_fits_the_schema(measured: bool) -> None:
    report = made(measured=measured)
    text = report.to_json()
    assert AnalysisReport.from_json(text) == report
    assert json.loads(text)["schema"] == 1
    assert text.endswith("}\n")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema("analysis"))
    jsonschema.validate(json.loads(text), schema("analysis"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": 2}, "schema"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"images": "64"}, "images"),
        ({"norm": "l1"}, "norm"),
        ({"layers": None}, "layers"),
    ],
)
def test_other_documents_are_refused(full: AnalysisReport, change: dict[str, Any], match: str) -> None:
    text = json.dumps(json.loads(full.to_json()) | change)
    with pytest.raises(UsageError, match=match):
        AnalysisReport.from_json(text, "analysis.json")


def test_numbers_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Bound(lower=0, upper=float("inf"), method="gram")


def test_norms_are_never_confused(bare: AnalysisReport) -> None:
    text = show_analysis(bare)
    table = rows(text, "Norms of W")
    assert table[0] == ["layer", "op", "shape", "weights", "MACs", "reshaped", "operator l2", "operator linf"]
    assert table[1] == ["first", "Conv", "4x2x3x3", "72", "12,345", "2", "[3, 3.25]", "7"]
    assert table[2][-3:] == ["2", "-", "-"]


def test_without_data(bare: AnalysisReport) -> None:
    text = show_analysis(bare)
    assert rows(text, "Values") == [["layer", "weights"], ["first", "-0.5 to 0.75"], ["second", "-0.5 to 0.75"]]
    assert rows(text, "||dW|| / ||W||")[1:] == [["first", "0.075", "0.075"], ["second", "0.075", "-"]]
    for word in ("threat", "images", "Spearman", "amplified", "nats"):
        assert word not in text


def test_with_data(full: AnalysisReport) -> None:
    text = show_analysis(full)
    assert "linf 0.1, seed 3" in text
    assert "0.500 clean, 2.500 adversarial, 0.750 robust, in nats" in text
    values = rows(text, "Values, and")
    assert values[0] == ["layer", "weights", "inputs", "outputs", "amplified in", "amplified out"]
    assert values[1] == ["first", "-0.5 to 0.75", "-1.5 to 2.5", "-1.5 to 2.5", "0.375", "-"]
    assert rows(text, "Change of the robust loss") == [
        ["layer", "int4", "log4:max"], ["first", "+0.125", "+0.125"], ["second", "+0.125", "-"],
    ]  # fmt: skip
    ranked = rows(text, "Rank correlation")
    assert ranked[1] == ["int4", "3", "-0.50", "+0.25", "-", "-0.50", "+0.25", "-"]
    assert ranked[2][0] == "all together"
    assert text.endswith("note  how to read it\n\nnet: a sentence.\n")


def test_all_candidates(full: AnalysisReport, bare: AnalysisReport) -> None:
    text = show_analysis(full, candidates=True)
    assert "2 of 3 candidates meet both" in text
    table = rows(text, "Candidates, rounded to nearest\n")
    assert table[1] == [
        "first", "int4", "1,234", "2.2", "1.00", "0.15", "0.50", "0.075", "0.042", "+0.125", "0.010", "-1.500",
        "+0.062", "0.25",
    ]  # fmt: skip
    assert table[3][8] == "-"
    assert len(table[0]) == len(table[1]) == 14
    assert "Change of the robust loss in nats" not in text
    plain = rows(show_analysis(bare, candidates=True), "Candidates, rounded to nearest\n")
    assert plain[0] == ["layer", "format", "bytes", "||Wq||", "/ T", "||dW||", "/ T", "relative", "weighted"]
    assert all(len(row) == 9 for row in plain)


def test_a_layer_of_zeros_exceeds_nothing(bare: AnalysisReport) -> None:
    zeros = candidate("int4", measured=False).model_copy(update={"norm_wq": exactly(0), "norm_dw": exactly(0)})
    facts = layer("zeros", measured=False, threshold_wq=0.0, candidates=[zeros])
    text = show_analysis(bare.model_copy(update={"layers": [facts]}), candidates=True)
    assert rows(text, "Candidates, rounded to nearest\n")[1][3:7] == ["0", "-", "0", "0.00"]
