"""A limit on memory at every step, by the worked cost model whose weights lie beside the activations."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import qopt
import qopt.plugins
from qopt.data import Data
from qopt.errors import InfeasibleError

PLUGIN = Path(__file__).parents[2] / "examples" / "cost_model_plugin" / "qopt_tiny_npu.py"
FEW: dict[str, Any] = {
    "target": "tiny-npu", "effort": "fast", "probe_images": 8, "calibration_images": 40, "baselines": (),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as if it were installed, on a device with as much flash as one likes."""
    spec = importlib.util.spec_from_file_location("qopt_tiny_npu", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "qopt_tiny_npu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.TinyNpu, "limits", lambda self: ())  # 64 KB of flash would ask for 4 bits by itself
    monkeypatch.setitem(qopt.plugins.BUILT_IN["qopt.cost_models"], "tiny-npu", "qopt_tiny_npu:TinyNpu")


def optimized(example: Path, data: Data, *limits: str, **options: Any) -> qopt.Bundle:
    return qopt.optimize(example, data=data, limits=limits, **{**FEW, **options})


def peak(bundle: qopt.Bundle, limit: str) -> float:
    (row,) = [row for row in bundle.report.limits if row.limit.startswith(limit) and row.machine == "tiny-npu"]
    assert row.holds
    return row.value


@pytest.mark.parametrize("search", ["greedy", "exact"])
def test_the_limit_holds_at_every_step(example_onnx: Path, fashion: Data, search: str) -> None:
    free = optimized(example_onnx, fashion, "sram<=1MB", search=search)
    most = peak(free, "sram")
    heaviest = max(free.report.layers, key=lambda row: math.prod(row.shape) * row.bits)
    tight = optimized(example_onnx, fashion, f"sram<={most * 0.85:.0f}", search=search)
    assert peak(tight, "sram") <= most * 0.85
    formats = {row.name: row.format for row in tight.report.layers}
    assert heaviest.format.startswith("int8")
    assert formats[heaviest.name].startswith("int4"), "its weights were the most beside the activations"
    assert any(text.startswith("int8") for text in formats.values()), "others keep their bits"


def test_what_cannot_be_kept_names_the_step_and_the_least(example_onnx: Path, fashion: Data) -> None:
    with pytest.raises(InfeasibleError, match=r"sram<=\d+: no plan keeps the limit \(got at least .* KB"):
        optimized(example_onnx, fashion, "sram<=16KB")
