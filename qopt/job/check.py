"""Whether an output folder is what its own report says: hashes, plan, kernels, norms of the shipped codes, accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from qopt.attacks import accuracy_vector
from qopt.data import Data
from qopt.errors import QoptError, UsageError
from qopt.lipschitz import reshaped_l2
from qopt.measure.network import ArtefactClassifier, Normalisation
from qopt.plan import Plan
from qopt.report.model import LayerRow, Report
from qopt.runtime.external import MODEL
from qopt.runtime.kernels import session_and_kernels
from qopt.runtime.session import Runner
from qopt.runtime.shipped import shipped_formats, shipped_weights
from qopt.statistics import accuracy_interval

CLOSE: Final = 1e-4
"""Largest relative difference of a norm from the report's, which holds the upper ends of sound bounds."""

SAMPLE: Final = 500
"""Report images that accuracy is checked on, at most, unless asked otherwise."""


@final
@dataclass(frozen=True)
class Checked:
    """One thing that was checked; ``holds`` is None where it could not be."""

    name: str
    holds: bool | None
    text: str


def check_folder(folder: Path, data: Data | None = None, *, sample: int = SAMPLE) -> list[Checked]:
    """Check what `qopt optimize` wrote, on this machine.

    Raises:
        UsageError: no such folder, or one without a manifest and a report that can be read.
    """
    manifest, report = _manifest(folder), _report(folder)
    rows = [_hashes(folder, manifest)]
    steps: list[tuple[str, Callable[[], Checked]]] = [
        ("plan", lambda: _plan(folder, report)),
        ("kernels", lambda: _kernels(folder, report)),
        ("norms", lambda: _norms(folder, report)),
        ("accuracy", lambda: _accuracy(folder, report, manifest, data, sample)),
    ]
    for name, step in steps:
        try:
            rows.append(step())
        except (QoptError, OSError, ValueError) as error:
            rows.append(Checked(name, False, " ".join(str(error).split())))
    return rows


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            "no output folder of qopt optimize", where=str(folder), got=f"{path.name}: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise UsageError("not a manifest", where=str(path), got=str(error)) from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise UsageError("not a manifest", where=str(path), expected="an object with the key 'files'")
    return found


def _report(folder: Path) -> Report:
    path = folder / "report.json"
    try:
        return Report.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the report cannot be read", where=str(path), got=str(error)) from error


def _hashes(folder: Path, manifest: Mapping[str, Any]) -> Checked:
    wrong = []
    for name, digest in manifest["files"].items():
        path = folder / name
        inside = Path(name).name == name
        if not inside or not path.is_file():
            wrong.append(f"{name} is missing")
        else:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    wrong.append(f"{name} was changed")
    return Checked("hashes", not wrong, "; ".join(wrong) or f"{len(manifest['files'])} files are as they were written")


def _plan(folder: Path, report: Report) -> Checked:
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    formats = plan.weight_specs([row.name for row in report.layers])
    shipped = shipped_formats(folder / MODEL)
    wrong = [
        f"{row.name}: plan {formats[row.name]}, report {row.format}, file {shipped.get(row.name)}"
        for row in report.layers
        if not str(formats[row.name]) == row.format == shipped.get(row.name)
    ]
    return Checked("plan", not wrong, "; ".join(wrong) or f"plan, report and file agree on {len(report.layers)} layers")


def _kernels(folder: Path, report: Report) -> Checked:
    found = session_and_kernels(folder / MODEL)[1]
    text = f"{found.integer} integer and {found.float_} float kernels, as reported"
    if (found.integer, found.float_) == (report.kernels.integer, report.kernels.floating):
        return Checked("kernels", True, text)
    expected = f"{report.kernels.integer} integer and {report.kernels.floating} float"
    fused = found.integer >= report.kernels.integer
    return Checked("kernels", fused, f"{found.integer} integer and {found.float_} float kernels, reported {expected}")


def _norms(folder: Path, report: Report) -> Checked:
    """The spectral norm of every weight as the file computes it, against the report's ``norm_wq``."""
    rows = {row.name: row for row in report.layers}
    weights = dict(shipped_weights(folder / MODEL, {name: row.shape for name, row in rows.items()}))
    wrong = []
    for name, (weight, groups) in weights.items():
        norm = reshaped_l2(torch.from_numpy(weight.astype(np.float64)), _axis(rows[name]), groups, where=name).upper
        if abs(norm - rows[name].norm_wq) > CLOSE * max(norm, rows[name].norm_wq):
            wrong.append(f"{name}: {norm:.6g}, reported {rows[name].norm_wq:.6g}")
    if not weights:
        return Checked(
            "norms", None, "weights that stay packed at run time, or lie in another file, are not recomputed"
        )
    return Checked("norms", not wrong, "; ".join(wrong) or f"||W_q|| of {len(weights)} layers is as reported")


def _axis(row: LayerRow) -> int:
    """The axis of output channels: of a matrix it makes no difference to the norm."""
    return 1 if row.op == "ConvTranspose" else 0


def _accuracy(folder: Path, report: Report, manifest: Mapping[str, Any], data: Data | None, sample: int) -> Checked:
    row = next((row for row in report.rows if row.name == "qopt"), None)
    if row is None:
        return Checked("accuracy", None, "the report measured nothing on images")
    if data is None:
        return Checked("accuracy", None, "not measured: give --data")
    part = data.shaped(tuple(report.model.input_shape)).report.first(sample)
    normalisation = Normalisation(*(tuple(manifest.get("options", {}).get(key, ())) for key in ("mean", "std")))
    classifier = ArtefactClassifier(Runner(folder / MODEL, batch=report.model.batch), normalisation)
    right = accuracy_vector(classifier, torch.from_numpy(part.images), torch.from_numpy(part.labels))
    found = accuracy_interval(right.numpy())
    low, high = 100 * found.low, 100 * found.high
    text = f"{100 * found.value:.1f} % ({low:.1f}-{high:.1f}) on {found.n} images, reported {row.clean.value:.1f} %"
    return Checked("accuracy", low <= row.clean.high and row.clean.low <= high, text)


def exit_code(rows: list[Checked]) -> int:
    """0 where everything that was checked holds, else 1."""
    return 1 if any(row.holds is False for row in rows) else 0
