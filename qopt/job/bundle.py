"""The output folder, whole in memory before any of it is written."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

from qopt import __version__
from qopt.files import write_folder
from qopt.plan import Plan
from qopt.report.html import to_html
from qopt.report.markdown import to_markdown
from qopt.report.model import Report

SCHEMA = 1
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "scipy")


@final
@dataclass(frozen=True, eq=False)
class Bundle:
    """What `optimize` returns.

    Attributes:
        model: the emitted ONNX file's bytes.
        plan: what every layer got, and why.
        report: everything that was measured.
        manifest: hashes, versions, seed, options, timings and latencies.
        journal: one JSON line for each plan that was evaluated.
        sources: file name to text of the network as C, where it was asked for.
        external: tensors of a model that one file does not hold, written as ``model.onnx.data``; empty for all others.
    """

    model: bytes
    plan: Plan
    report: Report
    manifest: Mapping[str, Any]
    journal: str
    sources: Mapping[str, str] = field(default_factory=dict)
    external: bytes = b""

    @property
    def exit_code(self) -> int:
        """0 where every gate and limit holds, 1 where one fails."""
        return 0 if self.report.gates_hold and self.report.limits_hold else 1

    @property
    def robust_accuracy(self) -> float | None:
        """Accuracy of the emitted file under every attack of the threat model, in percent; None if not attacked."""
        return self.report.robust_accuracy

    def files(self) -> dict[str, bytes]:
        """Name to content of the output folder."""
        texts = {
            "plan.json": self.plan.to_json(),
            "report.json": self.report.to_json(),
            "report.md": to_markdown(self.report),
            "report.html": to_html(self.report, self.manifest.get("latency_seconds")),
            "journal.jsonl": self.journal,
            **self.sources,
        }
        # the data come first: whoever finds the new model finds what it points to
        data = {"model.onnx.data": self.external} if self.external else {}
        files = {**data, "model.onnx": self.model, **{name: text.encode() for name, text in texts.items()}}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = {**self.manifest, "files": hashes}
        return {**files, "manifest.json": (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()}

    def write(self, folder: str | Path) -> Path:
        """Write the folder; raises UsageError where it cannot be written."""
        write_folder(Path(folder), self.files())
        return Path(folder)


def environment() -> dict[str, Any]:
    """Versions and machine, for the manifest."""
    return {
        "schema": SCHEMA,
        "qopt": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "libraries": {name: version(name) for name in LIBRARIES},
    }
