"""A new grid from one file: an installed package brings it, plans name it, and its file runs in ONNX Runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qopt.errors import UsageError
from qopt.plugins import plugins
from qopt.quant import Quantizer, Rows, quantize_whole
from qopt.quant.quantizer import GROUP, quantizer
from qopt.spec import WeightSpec

NEW_GRID = '''
"""Four bits that lie denser around zero: squares, with their sign."""
import torch
from qopt.quant import Rows

LEVELS = torch.tensor([-64, -49, -36, -25, -16, -9, -4, -1, 0, 1, 4, 9, 16, 25, 36, 64], dtype=torch.int8)


class Squares:
    name = "squares"

    def quantize(self, weight, spec, axis):
        rows = Rows.of(weight, spec, axis)
        top = rows.values.abs().amax(dim=1)
        scale = torch.where(top > 0, top / 64, 1.0).float()
        distance = (rows.values / scale.double()[:, None])[:, :, None] - LEVELS.double()
        return rows.assemble(distance.abs().argmin(dim=2).to(torch.uint8), scale, LEVELS)
'''

USE = """
import json
import onnx_ir as ir, onnxruntime, torch
from qopt.plan import Plan
from qopt.plugins import plugins
from qopt.quant import quantize_whole
from qopt.runtime.patterns import float_weight, integer_weight
from qopt.size import Stored
from qopt.spec import WeightSpec

spec = WeightSpec.parse(next(iter(Plan(weights={"fc": "squares@4:tensor"}).weight_specs(["fc"]).values())).__str__())
weight = quantize_whole(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), spec)
again = quantize_whole(weight.dequantize(), spec)
same = []
for subgraph, value in (integer_weight("fc", weight, zero_points=False), float_weight("fc", weight)):
    value.type = ir.TensorType(ir.DataType.FLOAT)
    constants = [*subgraph.initializers.values(), *subgraph.tables.values()]
    graph = ir.Graph([], [value], nodes=subgraph.nodes, initializers=constants, name="g", opset_imports={"": 21})
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    same.append(bool((torch.from_numpy(session.run(None, {})[0]) == weight.dequantize()).all()))
print(json.dumps({
    "spec": str(spec), "origin": plugins("qopt.quantizers")["squares"].origin, "same": same,
    "levels": len(weight.levels()[0]), "idempotent": bool(torch.equal(again.dequantize(), weight.dequantize())),
    "bytes": Stored(54, 6, spec).code_bytes,
}))
"""


def test_a_package_brings_a_grid(tmp_path: Path) -> None:
    (tmp_path / "plug_squares.py").write_text(NEW_GRID)
    info = tmp_path / "squares-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: squares\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qopt.quantizers]\nsquares = plug_squares:Squares\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "spec": "squares@4:tensor", "origin": "squares 1.0", "same": [True, True], "levels": 16, "idempotent": True,
        "bytes": 27,
    }  # fmt: skip


def test_built_in_quantizers_are_in_the_table() -> None:
    assert sorted(plugins(GROUP)) == ["binary", "linear", "log", "ternary"]
    for name in plugins(GROUP):
        made: Quantizer = quantizer(name)
        assert made.name == name
    assert {WeightSpec.parse(text).quantizer for text in ("int1", "int2", "log2", "ternary")} == set(plugins(GROUP))


def test_an_unknown_quantizer_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"weight format: unknown name .*'linaer'.* did you mean 'linear'"):
        quantize_whole(torch.ones(2, 2), WeightSpec.parse("linaer@4"))


@pytest.mark.parametrize("granularity", ["", ":tensor"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_go_back_to_where_they_came_from(granularity: str, axis: int) -> None:
    spec = WeightSpec.parse(f"int8{granularity}")
    weight = torch.arange(-12, 12, dtype=torch.float32).reshape(2, 3, 4)
    rows = Rows.of(weight, spec, axis)
    count = 1 if granularity else weight.shape[axis]
    assert rows.values.shape == (count, 24 // count)
    assert rows.values.dtype == torch.float64
    back = rows.assemble(rows.values.to(torch.int8), torch.ones(count))
    assert torch.equal(back.dequantize(), weight)
    assert back.scale.ndim == (0 if granularity else 1)
