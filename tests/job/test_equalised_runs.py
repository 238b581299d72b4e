"""Cross-layer equalisation on request: the plan says so, and applying the plan again does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qopt
from qopt.config import Options
from qopt.data import Data
from qopt.graph.prepare import prepare
from qopt.job.equalised import tries_equalisation
from qopt.limits import parse_limit
from qopt.plan import Plan
from qopt.runtime.session import to_bytes


@pytest.fixture(scope="module")
def equalised(example_onnx: Path, fashion: Data) -> qopt.Bundle:
    """A run whose layers are equalised first."""
    return qopt.optimize(
        example_onnx, data=fashion, equalisation="on", effort="fast", calibration_images=64, probe_images=32,
        baselines=(),
    )  # fmt: skip


def test_the_plan_says_so(equalised: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    assert equalised.plan.equalisation
    assert equalised.manifest["options"]["equalisation"] == "on"
    plain = qopt.optimize(
        example_onnx, data=fashion, effort="fast", calibration_images=64, probe_images=32, baselines=()
    )  # fmt: skip
    assert not plain.plan.equalisation
    assert plain.plan.model != equalised.plan.model
    assert plain.model != equalised.model


def test_float_stays_the_same_network(equalised: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    plan = Plan(equalisation=True)
    moved = qopt.optimize(example_onnx, data=fashion, plan=plan, baselines=())
    plain = qopt.optimize(example_onnx, data=fashion, plan=Plan(), baselines=())
    assert moved.model != plain.model
    assert moved.report.rows[-1].clean == plain.report.rows[-1].clean


def test_the_plan_applied_again_gives_the_same_file(equalised: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    again = qopt.optimize(
        example_onnx, data=fashion, plan=Plan.from_json(equalised.plan.to_json()), calibration_images=64, baselines=()
    )
    assert again.plan.weights == equalised.plan.weights
    assert again.model == equalised.model


def test_the_command_line(equalised: qopt.Bundle) -> None:
    assert "--equalisation on" in equalised.report.command


@pytest.fixture(scope="module")
def uneven_onnx(example_model: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded network with channels of very different ranges between two layers, which a ReLU does not see."""
    prepared = prepare(example_model.clone())
    nodes = list(prepared.model.graph)
    pairs = [
        (first, second)
        for first, relu, second in zip(nodes, nodes[1:], nodes[2:], strict=False)
        if (first.op_type, relu.op_type, second.op_type) == ("Conv", "Relu", "Conv")
        and len(relu.outputs[0].consumers()) == 1
        and second.inputs[0] is relu.outputs[0]
    ]
    assert pairs
    values = prepared.model.graph.initializers
    for first, second in pairs:
        names = [str(value.name) for value in (*first.inputs[1:3], second.inputs[1]) if value is not None]
        weight, bias, behind = map(prepared.initializer, names)
        factors = np.exp2(np.random.default_rng(1).integers(-4, 5, len(weight))).astype(np.float32)
        moved: list[np.ndarray] = [
            weight * factors[:, None, None, None], bias * factors, behind / factors[:, None, None],
        ]  # fmt: skip
        for name, array in zip(names, moved, strict=True):
            values[name].const_value = ir.tensor(array, name=name)
    path = tmp_path_factory.mktemp("uneven") / "uneven.onnx"
    path.write_bytes(to_bytes(prepared.model))
    return path


FEW: dict[str, Any] = {
    "limits": ("bits<=3",),
    "calibration_images": 128,
    "probe_images": 64,
    "baselines": (),
    "rounding": "nearest",
}
"""Rounded to nearest, where equalised channels are worth most."""


@pytest.fixture(scope="module")
def tried(uneven_onnx: Path, fashion: Data) -> dict[str, qopt.Bundle]:
    """A network of uneven channels at effort ``max``, with equalisation left open and not."""
    return {
        word: qopt.optimize(uneven_onnx, data=fashion, effort="max", equalisation=word, **FEW)
        for word in ("auto", "off", "on")
    }


def test_most_effort_measures_it_beside_the_chosen_plan(tried: dict[str, qopt.Bundle]) -> None:
    rows = {word: bundle.report.search.evaluated for word, bundle in tried.items()}
    chosen = next(row for row in rows["off"] if row.chosen)
    assert rows["auto"][-1].name == chosen.name.replace(",", ", equalised,", 1)
    assert len(rows["auto"]) == len(rows["off"]) + 1
    for before, after in zip(rows["off"], rows["auto"], strict=False):
        assert before.model_copy(update={"chosen": False}) == after.model_copy(update={"chosen": False})


def test_what_stays_closest_to_float_ships(tried: dict[str, qopt.Bundle]) -> None:
    rows = tried["auto"].report.search.evaluated
    best = min(rows, key=lambda row: row.clean_divergence)
    assert [row for row in rows if row.chosen] == [best]
    assert best.digest == tried["auto"].plan.digest
    assert tried["auto"].plan.equalisation == (best is rows[-1])


def test_uneven_channels_are_evened_out(tried: dict[str, qopt.Bundle]) -> None:
    assert tried["auto"].plan.equalisation
    assert tried["auto"].report.rows[-1].clean.value >= tried["off"].report.rows[-1].clean.value


def test_less_effort_leaves_the_network_as_it_is(example_onnx: Path, fashion: Data) -> None:
    plain = qopt.optimize(
        example_onnx, data=fashion, effort="fast", calibration_images=64, probe_images=32, baselines=()
    )
    assert not plain.plan.equalisation
    assert not any("equalised" in row.name for row in plain.report.search.evaluated)


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        (Options(effort="max"), False, True),
        (Options(effort="max"), True, False),
        (Options(), False, False),
        (Options(effort="max", equalisation="off"), False, False),
        (Options(effort="max", limits=(parse_limit("bits<=3"),)), False, True),
        (Options(effort="max", limits=(parse_limit("lipschitz<=100"),)), False, False),
    ],
)
def test_it_is_tried_where_it_is_left_open(options: Options, given: bool, expected: bool) -> None:
    """A limit on the Lipschitz constant is held by the norms of the network as it is."""
    assert tries_equalisation(options, given) == expected
