"""The job chooses formats per output channel where they are closer to float, and only where they are allowed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import qopt
from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.errors import UsageError
from qopt.job import row_formats
from qopt.job.optimize import Task, start
from qopt.job.row_formats import SMALLEST, _in_rows
from qopt.job.run import Run
from qopt.limits import parse_limit
from qopt.quant import quantize_weight
from qopt.quant.gptq import as_rows
from qopt.spec import WeightSpec

pytestmark = pytest.mark.long

OPTIONS: dict[str, Any] = {
    "calibration_images": 128, "probe_images": 64, "baselines": (), "limits": ("bits<=2.5",), "activations": "float",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(example_onnx: Path, fashion: Data) -> dict[str, qopt.Bundle]:
    """One low-bit run for every word."""
    return {rows: qopt.optimize(example_onnx, data=fashion, rows=rows, **OPTIONS) for rows in ("auto", "on", "off")}


def has_rows(bundle: qopt.Bundle) -> bool:
    return any(WeightSpec.parse(text).rows for text in bundle.plan.weights.values())


def test_on_and_off_are_obeyed(runs: dict[str, qopt.Bundle]) -> None:
    names = {word: {row.name.split(",")[0] for row in bundle.report.search.evaluated} for word, bundle in runs.items()}
    assert names["on"] == {"rows"}
    assert "rows" not in names["off"]
    assert names["auto"] >= {"rows", "greedy"}
    assert has_rows(runs["on"])
    assert not has_rows(runs["off"])


def test_auto_takes_the_closest(runs: dict[str, qopt.Bundle]) -> None:
    """Rows use the bits where they count, so at 2.5 bits they win here."""
    divergence = {
        word: next(row.clean_divergence for row in bundle.report.search.evaluated if row.chosen)
        for word, bundle in runs.items()
    }
    assert divergence["auto"] == min(divergence.values())
    assert divergence["on"] < divergence["off"]
    assert has_rows(runs["auto"])


def test_limits_are_kept_by_the_file(runs: dict[str, qopt.Bundle]) -> None:
    for bundle in runs.values():
        assert bundle.report.size.code_bits <= 2.5
    assert runs["on"].report.size.code_bits > 2.4
    assert len(runs["on"].model) < 1.15 * len(runs["off"].model)


def test_the_reasons_count_the_rows(runs: dict[str, qopt.Bundle]) -> None:
    plan = runs["on"].plan
    for layer, text in plan.weights.items():
        spec = WeightSpec.parse(text)
        if spec.rows:
            for row, count in spec.row_counts.items():
                assert f"{count} in {row}" in plan.reasons[layer]


def test_the_same_seed_gives_the_same_rows(runs: dict[str, qopt.Bundle], example_onnx: Path, fashion: Data) -> None:
    again = qopt.optimize(example_onnx, data=fashion, rows="on", **OPTIONS)
    assert again.plan == runs["on"].plan
    assert again.model == runs["on"].model


@pytest.mark.parametrize(
    "options",
    [{"thresholds": "weighted"}, {"effort": "fast"}, {"rounding": "nearest"}, {"search": "lipschitz"}],
    ids=lambda options: next(iter(options)),
)
def test_auto_leaves_rows_alone(options: dict[str, str], example_onnx: Path, fashion: Data) -> None:
    asked = OPTIONS | {"limits": ("bits<=6",)} | options
    bundle = qopt.optimize(example_onnx, data=fashion, **asked)
    assert not any(row.name.startswith("rows") for row in bundle.report.search.evaluated)


@pytest.mark.parametrize(
    ("target", "rows", "formats"),
    [("int8", "auto", {"int8"}), ("int8", "on", {"int8"}), ("int4-uniform", "auto", {"int4"}),
     ("x86-avx2,int8", "auto", {"int7"})],
)  # fmt: skip
def test_targets_of_one_format_leave_rows_no_choice(
    target: str, rows: str, formats: set[str], example_onnx: Path, fashion: Data
) -> None:
    """At normal effort, which tries rows: each layer gets the format, and nothing but the rounding is measured."""
    bundle = qopt.optimize(example_onnx, data=fashion, **(OPTIONS | {"limits": (), "target": target, "rows": rows}))
    assert set(bundle.plan.weights.values()) == formats
    assert len({name.split(",")[0] for name in (row.name for row in bundle.report.search.evaluated)}) == 1


def test_asked_for_thresholds_filter_rows(example_onnx: Path, fashion: Data) -> None:
    """At a bound of 0.1 no layer may be coarse, and so no row."""
    asked = OPTIONS | {"limits": (), "thresholds": "weighted", "threshold": 0.1, "rows": "on"}
    bundle = qopt.optimize(example_onnx, data=fashion, **asked)
    specs = [WeightSpec.parse(text) for text in bundle.plan.weights.values()]
    formats = {str(row) for spec in specs for row in (spec.row_counts or {spec: 1})}
    assert not formats & {"int1", "ternary", "int2"}


def test_rows_need_images(example_onnx: Path) -> None:
    with pytest.raises(UsageError, match=r"--rows: .*; give --data"):
        qopt.optimize(example_onnx, rows="on")


def test_what_float_does_not_withstand_does_not_count(example_onnx: Path, fashion: Data) -> None:
    """At a radius at which the attack always wins, the closest plan on clean images is chosen."""
    asked = OPTIONS | {"probe_images": 32, "attack_images": 20}
    bundle = qopt.optimize(example_onnx, data=fashion, robust=True, eps=0.9, gates=(), **asked)
    rows = bundle.report.search.evaluated
    assert {row.adversarial_divergence for row in rows} == {0.0}
    assert min(rows, key=lambda row: row.clean_divergence).chosen


def test_sizes_of_rows_are_those_that_were_solved_for(runs: dict[str, qopt.Bundle]) -> None:
    report = runs["on"].report
    weights = {layer.name: math.prod(layer.shape) for layer in report.layers}
    bits = sum(WeightSpec.parse(layer.format).container_bits * weights[layer.name] for layer in report.layers)
    assert bits / sum(weights.values()) == pytest.approx(report.size.code_bits)


def test_small_layers_have_one_format(runs: dict[str, qopt.Bundle]) -> None:
    for layer in runs["on"].report.layers:
        assert not WeightSpec.parse(layer.format).rows or math.prod(layer.shape) >= SMALLEST


@pytest.fixture(scope="module")
def run(example_model: ir.Model, fashion: Data) -> Run:
    options = Options(probe_images=48, calibration_images=64, limits=(parse_limit("bits<=2.5"),))
    return start(Task(example_model, "example", fashion, options), Cache(None), lambda step: None)


def test_codes_of_copied_rows_are_those_of_the_layer(run: Run) -> None:
    """One weight of all rows in all formats, quantized as such, is what the formats gave one at a time."""
    formats = tuple(WeightSpec.parse(text) for text in ("ternary", "int2", "int3", "int4", "log4"))
    for layer in run.prepared.layers:
        rows = as_rows(run.quantizer.weight(layer), layer.channel_axis, layer.groups)
        copies = rows[:, None].expand(-1, len(formats), -1, -1).flatten(0, 2)
        spec = WeightSpec.of_rows([s for _ in range(layer.groups) for s in formats for _ in range(rows.shape[1])])
        expected, found = quantize_weight(copies, spec), _in_rows(run, layer, spec)
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize(("macs", "images"), [(10**15, 48), (10**6, 32), (1, 32)])
def test_a_large_network_affords_fewer_images(
    run: Run, monkeypatch: pytest.MonkeyPatch, macs: int, images: int
) -> None:
    monkeypatch.setattr(row_formats, "ROW_MACS", macs)
    formats = {layer.name: (WeightSpec.parse("int2"),) for layer in run.prepared.layers}
    assert len(row_formats._inputs(run, formats)) == images
    both = replace(run, options=replace(run.options, robust=True))
    assert len(row_formats._inputs(both, formats)) == (2 * 48 if images == 48 else 32)
