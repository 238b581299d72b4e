"""Three architectures of `transformers` with random weights: exported, compiled to 4 bits and checked, without data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import qopt

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def architectures() -> Any:
    pytest.importorskip("transformers", reason="pip install qopt[architectures]")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("architectures").ARCHITECTURES


@pytest.mark.filterwarnings("ignore")  # of libraries, while they export
@pytest.mark.parametrize(("name", "layers"), [("MobileNetV2", 53), ("DistilBERT", 27), ("GPT-2", 17)])
def test_compiled_and_checked(architectures: Any, name: str, layers: int) -> None:
    module, example = architectures[name]()
    bundle = qopt.optimize(module, example=example, target="int4-uniform", rows="off")
    quantized = [row for row in bundle.report.layers if row.format != "float"]
    assert len(quantized) == layers
    assert bundle.report.size.ratio < 0.16
    assert bundle.report.kernels.difference is not None
    assert bundle.report.kernels.difference <= 1e-4
