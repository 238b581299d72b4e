"""qopt: a quantization compiler with robustness-aware search.

The public surface is loaded when first used, so that importing `qopt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qopt._version import __version__

if TYPE_CHECKING:
    from qopt.api import analyze, attack, certify, compare, load, optimize, preview
    from qopt.config import Options
    from qopt.data import Data, load_data
    from qopt.errors import QoptError
    from qopt.job.bundle import Bundle
    from qopt.plan import Plan
    from qopt.report.analysis_report import AnalysisReport
    from qopt.report.attack_report import AttackReport
    from qopt.report.certify_report import CertifyReport
    from qopt.report.comparison import Comparison
    from qopt.report.model import Report

_HOME = {
    "AnalysisReport": "qopt.report.analysis_report",
    "AttackReport": "qopt.report.attack_report",
    "Bundle": "qopt.job.bundle",
    "CertifyReport": "qopt.report.certify_report",
    "Comparison": "qopt.report.comparison",
    "Data": "qopt.data",
    "Options": "qopt.config",
    "Plan": "qopt.plan",
    "QoptError": "qopt.errors",
    "Report": "qopt.report.model",
    "analyze": "qopt.api",
    "attack": "qopt.api",
    "certify": "qopt.api",
    "compare": "qopt.api",
    "load": "qopt.api",
    "load_data": "qopt.data",
    "optimize": "qopt.api",
    "preview": "qopt.api",
}

__all__ = [
    "AnalysisReport",
    "AttackReport",
    "Bundle",
    "CertifyReport",
    "Comparison",
    "Data",
    "Options",
    "Plan",
    "QoptError",
    "Report",
    "__version__",
    "analyze",
    "attack",
    "certify",
    "compare",
    "load",
    "load_data",
    "optimize",
    "preview",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
