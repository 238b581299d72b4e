"""The JSON Schemas of what qopt writes, generated from the models that read it."""

from __future__ import annotations

import json
from typing import Any

from qopt.documents import Document
from qopt.plan import Plan
from qopt.report.analysis_report import AnalysisReport
from qopt.report.attack_report import AttackReport
from qopt.report.certify_report import CertifyReport
from qopt.report.comparison import Comparison
from qopt.report.model import Report

DOCUMENTS: dict[str, type[Document]] = {
    "plan": Plan,
    "report": Report,
    "attack": AttackReport,
    "comparison": Comparison,
    "certificates": CertifyReport,
    "analysis": AnalysisReport,
}
"""Name of the document to its model; the schema of ``plan`` is published as `docs/schemas/plan.schema.json`."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of the document ``name``, one of `DOCUMENTS`."""
    return {"$schema": DIALECT, **DOCUMENTS[name].model_json_schema(by_alias=True, mode="validation")}


def schema_files() -> dict[str, str]:
    """File name to text of every schema: two-space JSON with sorted keys, ending in a newline."""
    return {
        f"{name}.schema.json": json.dumps(schema(name), indent=2, sort_keys=True) + "\n" for name in DOCUMENTS
    }  # fmt: skip
