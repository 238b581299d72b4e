"""Devices and their limits in the main job: plans keep them, reports say what they cost, errors what is left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import qopt
from qopt.data import Data
from qopt.errors import InfeasibleError, UsageError
from qopt.hardware.checked import load_model
from qopt.hardware.describe import describe
from qopt.limits import parse_limit
from qopt.spec import WeightSpec

pytestmark = pytest.mark.long

QUICK: dict[str, Any] = {"effort": "fast", "probe_images": 32, "calibration_images": 64, "baselines": ()}


@pytest.fixture(scope="module")
def device_bundle(example_onnx: Path, fashion: Data) -> qopt.Bundle:
    """The example for a microcontroller, under a limit of flash that int8 alone would break."""
    limits = ("flash<=60KB", "latency<=80ms")
    return qopt.optimize(example_onnx, data=fashion, target="stm32f4,int4", limits=limits, **QUICK)


def priced(bundle: qopt.Bundle, model: str, quantity: str) -> float:
    """What the report says that a plan costs on a machine, in the units of limits."""
    note = next(note for note in bundle.report.search.notes if note.startswith(f"on {model}: "))
    found = re.search(rf"{quantity} ([^,(]+)", note)
    assert found is not None
    return parse_limit(f"{quantity}<={found[1].strip()}").bound


def test_the_plan_keeps_the_limits_of_the_device(device_bundle: qopt.Bundle) -> None:
    report = device_bundle.report
    assert report.target.startswith("stm32f4,int4: weights ternary, int2")
    assert report.target.endswith(
        "flash<=2097152, sram<=393216, bits<=4, flash<=61440, latency<=0.08s; priced by stm32f4"
    )
    assert priced(device_bundle, "stm32f4", "flash") <= 60 * 1024
    assert priced(device_bundle, "stm32f4", "latency") <= 0.08
    assert report.size.code_bits <= 4
    assert not [text for text in report.warnings if "above" in text]


def test_what_the_report_says_is_what_the_model_says(device_bundle: qopt.Bundle, example_onnx: Path) -> None:
    from qopt.api import load
    from qopt.graph.prepare import prepare

    network = describe(prepare(load(example_onnx)), 8)
    specs = {row.name: WeightSpec.parse(row.format) for row in device_bundle.report.layers}
    total = load_model("stm32f4").network_cost(network.layers, specs, network.steps)
    for quantity in ("flash", "latency", "sram"):
        assert priced(device_bundle, "stm32f4", quantity) == pytest.approx(total[quantity], rel=1e-3)


INFEASIBLE = [
    (
        "stm32f4",
        "latency<=10ms",
        r"latency<=0.01s: no plan keeps the limit \(got at least \S+ ms on stm32f4 with these",
    ),
    ("stm32f4", "flash<=20KB", r"flash<=20480: no plan keeps the limit \(got at least \S+ KB on stm32f4"),
    ("energy-45nm", "energy<=1uJ", r"energy<=1e-06J: no plan keeps the limit \(got at least \S+ uJ on energy-45nm"),
    ("bops", "bops<=1M", r"bops<=1000000: no plan keeps the limit \(got at least \S+ M on bops"),
]


@pytest.mark.parametrize(("target", "limit", "said"), INFEASIBLE)
def test_the_cheapest_value_that_can_be_reached(example_onnx: Path, target: str, limit: str, said: str) -> None:
    with pytest.raises(InfeasibleError, match=said) as caught:
        qopt.optimize(example_onnx, target=target, limits=(limit,))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_the_cheapest_value_can_be_reached(example_onnx: Path) -> None:
    with pytest.raises(InfeasibleError) as caught:
        qopt.optimize(example_onnx, target="bops", limits=("bops<=1M",))
    found = re.search(r"at least (\S+) M", str(caught.value))
    assert found is not None
    bundle = qopt.optimize(example_onnx, target="bops", limits=(f"bops<={1.001 * float(found[1])}M",))
    assert priced(bundle, "bops", "bops") == pytest.approx(1e6 * float(found[1]), rel=3e-3)


def test_memory_of_activations_is_looked_at_first(example_onnx: Path, fashion: Data) -> None:
    said = r"sram<=8192: no plan keeps the limit \(got at least 9.188 KB with int8 activations at node \S+: .*; raise"
    with pytest.raises(InfeasibleError, match=said):
        qopt.optimize(example_onnx, data=fashion, target="int4", limits=("sram<=8KB",), **QUICK)
    said = r"got at least 36.75 KB with float activations .*; raise the limit, or give --data for 8-bit activations"
    with pytest.raises(InfeasibleError, match=said):
        qopt.optimize(example_onnx, target="stm32f4", limits=("sram<=20KB",))
    assert qopt.optimize(example_onnx, target="int4", limits=("sram<=37KB",)).exit_code == 0


def test_a_quantity_that_nothing_prices(example_onnx: Path) -> None:
    with pytest.raises(UsageError, match=r"no cost model of this target prices energy \(got energy<=1J\)"):
        qopt.optimize(example_onnx, target="stm32f4", limits=("energy<=1J",))


def test_a_given_plan_that_breaks_a_limit_ends_with_1(example_onnx: Path) -> None:
    from qopt.plan import uniform

    plan = uniform(WeightSpec.parse("int8"))
    bundle = qopt.optimize(example_onnx, target="bops", limits=("bops<=300M",), plan=plan)
    warned = [text for text in bundle.report.warnings if "bops" in text]
    assert warned == ["the plan does not keep the limit bops<=300000000: 653.3 M (bops)"]
    assert bundle.report.search.notes == ["on bops: bops 653.3 M (limit 300 M)"]
    assert bundle.exit_code == 1


def test_formats_that_the_device_lacks_are_not_used(example_onnx: Path, fashion: Data) -> None:
    bundle = qopt.optimize(example_onnx, data=fashion, target="x86-avx2,int8", **QUICK)
    assert {row.format for row in bundle.report.layers} == {"int7"}
    assert not [text for text in bundle.report.warnings if "saturate" in text]


def test_targets_without_a_machine_say_nothing_new(example_onnx: Path) -> None:
    bundle = qopt.optimize(example_onnx, target="int4")
    assert not [note for note in bundle.report.search.notes if note.startswith("on ")]


def test_rows_keep_limits_of_devices_too(example_onnx: Path, fashion: Data) -> None:
    options = {**QUICK, "effort": "normal", "rows": "on", "rounding": "gptq", "bias_correction": "off"}
    bundle = qopt.optimize(
        example_onnx, data=fashion, target="energy-45nm,int4", limits=("energy<=5uJ",), thresholds="none", **options
    )
    assert priced(bundle, "energy-45nm", "energy") <= 5e-6 * (1 + 1e-3)
