"""The report of an attack: JSON, Markdown and terminal, from one made by hand."""

from __future__ import annotations

import json
import re

import pytest

from qopt.errors import UsageError
from qopt.report.attack_report import (
    AttackReport,
    AttackRow,
    FindingRow,
    SubjectFacts,
    attack_markdown,
    show_attack,
)
from qopt.report.model import Share
from qopt.report.schemas import schema


def share(value: float) -> Share:
    return Share(value=value, low=value - 2, high=value + 2, n=100)


@pytest.fixture
def report() -> AttackReport:
    white = AttackRow(
        attack="PGD-20", access="white", source="", origin="declared threat model", norm="linf", eps=8 / 255,
        counts=True, accuracy=share(40), fooled=50, within=50, mean_l2=1.25, mean_linf=0.031,
    )  # fmt: skip
    rows = [
        white,
        white.model_copy(
            update={
                "attack": "CW-L2", "norm": None, "eps": None, "counts": False, "within": 3, "accuracy": share(0),
                "origin": "a | paper",
            }
        ),
        white.model_copy(update={"attack": "Square", "access": "queries", "fooled": 0, "within": 0, "mean_l2": None,
                                 "mean_linf": None}),
        white.model_copy(update={"attack": "MIM-20", "access": "gray", "source": "other"}),
    ]  # fmt: skip
    findings = [
        FindingRow(rule="zero_gradients", triggered=True, warning=False, numbers={"share": 1}, tolerance=0, text="all"),
        FindingRow(rule="not_converged", triggered=True, warning=True, numbers={}, tolerance=0.1, text="5 %"),
        FindingRow(rule="losses_disagree", triggered=False, warning=False, numbers={}, tolerance=0.1, text="1 %"),
    ]  # fmt: skip
    return AttackReport(
        robust_accuracy=38.0, interval=share(38), verdict="net: masked.", threat="linf 8/255", norm="linf", eps=8 / 255,
        preset="quick", in_turn=False, seed=3, images=100, clean=share(90),
        model=SubjectFacts(
            name="net", digest="ab" * 32, input_shape=[3, 8, 8], classes=10, gradients=["ste", "bpda"], no_gradients="",
            agreement=99.5,
        ),
        rows=rows, masking="masked", findings=findings, left_out=["a step"], warnings=["a warning"],
    )  # fmt: skip


def blind(report: AttackReport) -> AttackReport:
    """Of a model without gradients."""
    model = report.model.model_copy(update={"gradients": [], "no_gradients": "operator X", "agreement": None})
    return report.model_copy(
        update={
            "model": model,
            "masking": "not checked",
            "findings": [],
            "left_out": [],
            "warnings": [],
            "in_turn": True,
        }
    )


def test_json_comes_back_and_fits_its_schema(report: AttackReport) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for one in (report, blind(report)):
        assert AttackReport.from_json(one.to_json()) == one
        jsonschema.validate(json.loads(one.to_json()), schema("attack"))
    content = json.loads(report.to_json())
    assert list(content)[:3] == ["schema", "robust_accuracy", "interval"]
    assert content["findings"][1]["warning"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"robust_accuracy": "38"}, "robust_accuracy"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"masking": "perhaps"}, "masking"),
        ({"schema": 2}, "schema"),
    ],
)
def test_other_documents_are_refused(report: AttackReport, change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AttackReport.from_json(json.dumps(json.loads(report.to_json()) | change))


def test_exit_codes(report: AttackReport) -> None:
    codes = {m: report.model_copy(update={"masking": m}).exit_code for m in ("none", "masked", "not checked")}
    assert codes == {"none": 0, "masked": 1, "not checked": 0}


MARKDOWN = """\
# net: attacked

net: masked.

- threat model: linf 8/255, preset quick, seed 3
- model: net, input [3, 8, 8], 10 classes, sha256 abababababab
- gradients: ste, bpda
- file and twin: same class on 99.50 % of the images
- images: 100
- clean: 90.0 % (88.0-92.0)
- robust: 38.0 % (36.0-40.0)
- masking: masked

## Attacks
"""


def test_markdown(report: AttackReport) -> None:
    text = report.to_markdown()
    assert text.startswith(MARKDOWN)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1] == (
        "| PGD-20 | white | linf 8/255 | all | 40.0 % (38.0-42.0) | 50 | 1.25 | 0.031 | declared threat model |"
    )
    assert rows[2] == "| CW-L2 | white | no bound | 3 of 50 | 0.0 % (-2.0-2.0) | 50 | 1.25 | 0.031 | a \\| paper |"
    assert rows[3] == "| Square | queries | linf 8/255 | all | 40.0 % (38.0-42.0) | 0 | - | - | declared threat model |"
    assert "| MIM-20 | gray (other) |" in rows[4]
    assert [row.split(" | ")[1] for row in rows[6:]] == ["yes", "warning", "no"]
    assert "## Left out\n\n- a step" in text
    assert text.endswith("## Warnings\n\n- a warning\n")
    assert not re.search(r" $", text, re.M)


def test_markdown_without_gradients(report: AttackReport) -> None:
    text = attack_markdown(blind(report))
    assert "- gradients: none: operator X" in text
    assert "file and twin" not in text
    assert "in turn: accuracy is what each and those before it left" in text
    for title in ("believed", "Left out", "Warnings"):
        assert title not in text


def test_terminal(report: AttackReport) -> None:
    text = show_attack(report)
    for words in (
        "linf 8/255, preset quick, seed 3",
        "PGD-20",
        "gray (other)",
        "zero_gradients",
        "a step",
        "a warning",
    ):
        assert words in text
    assert text.endswith("\n\nnet: masked.\n")
    assert not re.search(r" $", text, re.M)
    assert "zero_gradients" not in show_attack(blind(report))
