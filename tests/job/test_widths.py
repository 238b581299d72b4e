"""Fewer bits for activations in the main job: chosen where a limit prices them, kept, emitted, and accounted for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import qopt
from qopt.cache import Cache
from qopt.cli import app
from qopt.config import parse_activations, resolve_options
from qopt.data import Data
from qopt.errors import InfeasibleError, PlanError, UsageError
from qopt.graph.prepare import prepare
from qopt.job.optimize import Task
from qopt.job.preview import preview
from qopt.plan import Plan, uniform
from qopt.spec import ActivationSpec, WeightSpec

pytestmark = pytest.mark.long

QUICK: dict[str, Any] = {
    "effort": "fast", "probe_images": 32, "calibration_images": 64, "baselines": (),
}  # fmt: skip
LIMIT = 30_000_000


@pytest.fixture(scope="module")
def bundle(example_onnx: Path, fashion: Data) -> qopt.Bundle:
    """The example within fewer bit operations than int2 on 8-bit activations takes."""
    return qopt.optimize(example_onnx, data=fashion, target="bops", limits=(f"bops<={LIMIT}",), **QUICK)


def operations(model: ir.Model, plan: Plan) -> float:
    """Bit operations by the plan alone: MACs times bits of the weights times bits of what the layer reads.

    A view has the width of its source; the example has none but Flatten.
    """
    prepared = prepare(model)
    sources = {
        str(node.outputs[0].name): str(node.inputs[0].name)  # type: ignore[union-attr]
        for node in prepared.model.graph if node.op_type in ("Flatten", "Reshape", "Squeeze")
    }  # fmt: skip
    total = 0.0
    for layer in prepared.layers:
        (use,) = layer.uses
        tensor = use.input
        while tensor not in plan.ranges:
            tensor = sources[tensor]
        width = ActivationSpec.parse(plan.activations.get(tensor, plan.defaults.activations)).bits
        total += layer.macs * WeightSpec.parse(plan.weights[layer.name]).bits * width
    return total


def test_the_limit_is_kept_and_the_report_says_by_how_much(bundle: qopt.Bundle, example_onnx: Path) -> None:
    (row,) = [row for row in bundle.report.limits if row.machine == "bops"]
    assert row.holds
    assert row.value == pytest.approx(operations(ir.load(example_onnx), bundle.plan))
    assert 0.9 * LIMIT < row.value <= LIMIT


def test_narrow_tensors_are_in_the_plan_with_their_reasons(bundle: qopt.Bundle) -> None:
    plan = bundle.plan
    assert plan.defaults.activations == "int8"
    assert len(plan.activations) >= 4
    assert all(ActivationSpec.parse(spec).bits < 8 for spec in plan.activations.values())
    assert all("alone (int8" in plan.reasons[name] for name in plan.activations)
    (note,) = [note for note in bundle.report.search.notes if note.startswith("formats of the 8 tensors")]
    counts = Counter(plan.activations.values())
    assert all(f"{count} {spec}" in note for spec, count in counts.items())


def test_the_file_has_the_codes_of_the_plan(bundle: qopt.Bundle) -> None:
    formats = {row.tensor: row.format for row in bundle.report.activations}
    for name, spec in bundle.plan.activations.items():
        assert formats[name] == f"int{ActivationSpec.parse(spec).bits}"
    assert {formats[name] for name in formats if name not in bundle.plan.activations} == {"int8"}


def test_the_same_seed_gives_the_same_plan(bundle: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    again = qopt.optimize(example_onnx, data=fashion, target="bops", limits=(f"bops<={LIMIT}",), **QUICK)
    assert again.plan.to_json() == bundle.plan.to_json()


def test_a_plan_with_narrow_tensors_is_priced_as_it_is(bundle: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    """Not by the target's 8 bits: the same plan again keeps the limit, with wide activations it does not."""
    options = {**QUICK, "target": "bops", "limits": (f"bops<={LIMIT}",)}
    (row,) = qopt.optimize(example_onnx, data=fashion, plan=bundle.plan, **options).report.limits
    assert row.holds
    wide = bundle.plan.with_changes(activations={}, ranges={}, reasons={})
    (row,) = qopt.optimize(example_onnx, data=fashion, plan=wide, **options).report.limits
    assert not row.holds
    assert row.value == pytest.approx(operations(ir.load(example_onnx), wide.with_changes(ranges=bundle.plan.ranges)))


def test_formats_that_the_user_names(example_onnx: Path, fashion: Data) -> None:
    found = qopt.optimize(
        example_onnx, data=fashion, target="fpga-dsp48e2,int4", limits=("latency<=15.2us",),
        activations="int8,int4:p99.9", **QUICK,
    )  # fmt: skip
    assert set(found.plan.activations.values()) == {"int4:p99.9"}
    assert all(row.holds for row in found.report.limits)


def test_at_normal_effort_one_format_for_all_is_measured_beside(example_onnx: Path, fashion: Data) -> None:
    options = {**QUICK, "effort": "normal", "rounding": "nearest"}
    found = qopt.optimize(example_onnx, data=fashion, target="bops", limits=("bops<=50M",), **options)
    names = [row.name for row in found.report.search.evaluated]
    alike = {name.split(",")[0] for name in names if name.startswith("all activations ")}
    assert "all activations int8" in alike
    assert len(alike) == 2
    assert all(row.holds for row in found.report.limits)


@pytest.mark.parametrize("search", ["exact", "refit", "optuna"])
def test_every_search_by_divergences_has_them(search: str, example_onnx: Path, fashion: Data) -> None:
    found = qopt.optimize(
        example_onnx, data=fashion, target="bops", limits=(f"bops<={LIMIT}",), search=search, evaluations=2,
        rounding="nearest", bias_correction="off", **QUICK,
    )  # fmt: skip
    assert found.plan.activations
    assert all(row.holds for row in found.report.limits)


STAYS = [
    ({"target": "int4", "activations": "int8,int4"}, "no limit is on what fewer bits of activations save"),
    ({"target": "bops", "limits": ("bops<=100M",), "search": "uniform"}, "chosen by divergences alone"),
    ({"target": "bops", "limits": ("bops<=100M",), "sensitivity": "error"}, "chosen by divergences alone"),
]


@pytest.mark.parametrize(("options", "said"), STAYS)
def test_where_widths_stay_it_is_said(example_onnx: Path, fashion: Data, options: dict[str, Any], said: str) -> None:
    found = qopt.optimize(example_onnx, data=fashion, **options, **QUICK)
    assert not found.plan.activations
    assert [note for note in found.report.search.notes if said in note]


def test_a_target_without_a_limit_says_nothing_of_widths(example_onnx: Path, fashion: Data) -> None:
    found = qopt.optimize(example_onnx, data=fashion, target="bops,int4", **QUICK)
    assert not found.plan.activations
    assert not [note for note in found.report.search.notes if "activations" in note]


def test_what_no_width_reaches_is_named(example_onnx: Path, fashion: Data) -> None:
    with pytest.raises(
        InfeasibleError, match=r"bops<=5000000: no plan keeps the limit \(got at least 10\.\d+ M on bops"
    ):
        qopt.optimize(example_onnx, data=fashion, target="bops", limits=("bops<=5M",), **QUICK)


def test_a_dry_run_counts_with_every_width(example_model: ir.Model, fashion: Data) -> None:
    def seen(data: Data | None) -> str:
        options = resolve_options(target="bops", limits=("bops<=20M",))
        return preview(Task(example_model, "example", data, options), Cache(None), lambda step: None, "out").limits[0]

    assert seen(fashion).endswith("at least 10.21 M, can be kept by the layers")
    assert seen(None).endswith("cannot be kept")


@pytest.mark.parametrize(
    ("text", "said"),
    [("int8,float", "float is no width to choose"), ("int8,int9", "not an activation format"), ("", "not an")],
)
def test_wrong_formats_are_named(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        parse_activations(text)
    with pytest.raises(PlanError, match="--activations"):
        resolve_options(activations=text)


def test_formats_are_read_once_each_in_their_order() -> None:
    assert parse_activations("int8, int4:mse,int4:mse,int6") == tuple(
        map(ActivationSpec.parse, ("int8", "int4:mse", "int6"))
    )


def test_without_images_widths_are_a_usage_error(example_onnx: Path) -> None:
    with pytest.raises(UsageError, match="--activations"):
        qopt.optimize(example_onnx, target="bops", activations="int8,int4")


def test_plan_show_says_why(bundle: qopt.Bundle, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(bundle.plan.to_json())
    done = CliRunner().invoke(app, ["plan", "show", str(tmp_path / "plan.json")])
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name, spec in bundle.plan.activations.items():
        assert spec in lines[name]
        assert "read by" in lines[name]
    assert json.loads(bundle.plan.to_json())["activations"] == bundle.plan.activations


def test_a_uniform_plan_of_few_bits_is_priced_by_them(example_onnx: Path, fashion: Data) -> None:
    plan = uniform(WeightSpec.parse("int4"), ActivationSpec.parse("int4"))
    (row,) = qopt.optimize(
        example_onnx, data=fashion, plan=plan, target="bops", limits=("bops<=1G",), **QUICK
    ).report.limits
    assert row.value == pytest.approx(sum(layer.macs for layer in prepare(ir.load(example_onnx)).layers) * 16)
