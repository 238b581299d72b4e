"""The main job in its other forms: no data, other strategies, limits, gates, batch sizes, layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qopt
from qopt.data import Data, Split
from qopt.errors import InfeasibleError, UnsupportedModelError, UsageError
from qopt.job.gates import judge
from qopt.limits import Gate
from qopt.report.model import Drop, Row, Share

pytestmark = pytest.mark.long

SMALL: dict[str, Any] = {"attack_images": 40, "probe_images": 32, "calibration_images": 64, "baselines": ()}


def optimize(model: Path | nn.Module, **options: Any) -> qopt.Bundle:
    return qopt.optimize(model, **options)


def test_without_data_norms_choose_and_activations_stay_float(example_onnx: Path) -> None:
    bundle = optimize(example_onnx, robust=True)
    report = bundle.report
    assert bundle.exit_code == 0
    assert report.rows == []
    assert report.activations == []
    assert report.robust_accuracy is None
    assert report.search.thresholds == "paper"
    assert any("--data" in item for item in report.left_out)
    assert report.kernels.integer == 0
    assert report.size.code_bits <= 4.0
    kinds = {p.value for p in onnx.load_from_string(bundle.model).metadata_props if p.key == "qopt.kind"}
    assert kinds == {"simulated"}


def test_weight_only_runs_on_plain_float_kernels(example_onnx: Path) -> None:
    counts = optimize(example_onnx).report.kernels.counts
    assert not {"DequantizeLinear", "Gather", "Cast", "Mul"} & set(counts)


def test_algorithm_1_ignores_limits_and_says_so(example_onnx: Path) -> None:
    report = optimize(example_onnx, search="lipschitz").report
    assert {layer.format.split(":", 1)[1] for layer in report.layers} == {"tensor:max"}
    assert all("Algorithm 1" in layer.reason for layer in report.layers)
    if report.size.code_bits > 4:
        assert any("does not keep the limit bits<=4" in warning for warning in report.warnings)


@pytest.mark.parametrize("limit", ["bits<=2.5", "bits<=3", "size<=30KB"])
def test_limits_are_kept(example_onnx: Path, limit: str) -> None:
    report = optimize(example_onnx, limits=(limit,)).report
    if limit.startswith("bits"):
        assert report.size.code_bits <= float(limit.split("=")[1])
    else:
        weights = report.size.stored_bits * report.model.weights / 8
        assert weights <= 30 * 1024 + 2048, "codes and scales within the limit, shared tables beside it"


def test_an_unreachable_limit_names_what_can_be_reached(example_onnx: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"at least 1\.6 bits"):
        optimize(example_onnx, limits=("bits<=1.5",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "int5"}, "unknown target"),
        ({"search": "greed"}, "did you mean 'greedy'"),
        ({"gates": ("clean_drop<=1",)}, "give --data"),
        ({"thresholds": "weighted"}, "--thresholds: weighted thresholds .*; give --data"),
        ({"bias_correction": "on"}, "--bias-correction: .*; give --data"),
        ({"calibration": "adversarial"}, "--calibration: adversarial images are made of images; give --data"),
        ({"calibration": "advers"}, "expected auto, clean, adversarial, mixed"),
        ({"limits": ("latency<=5ms",)}, "prices latency"),
        ({"thresholds": "papers"}, "expected auto, paper"),
        ({"bias_correction": "yes"}, "expected auto, on, off"),
        ({"norm": "l1"}, "linf"),
        ({"eps": "big"}, "eps is not a number"),
        ({"baselines": ("int9",)}, "not a weight format"),
        ({"activations": "int9"}, "not an activation format"),
        ({"attack_images": 0}, "at least 1"),
        ({"mean": (0.5,), "std": ()}, "same number"),
        ({"sed": 1}, "did you mean 'seed'"),
    ],
)
def test_wrong_options(example_onnx: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        optimize(example_onnx, **options)


def test_labels_that_the_network_does_not_have(example_onnx: Path, fashion: Data) -> None:
    bad = Split(fashion.report.images, fashion.report.labels + 5)
    with pytest.raises(UsageError, match="labels out of range"):
        optimize(example_onnx, data=Data(fashion.calibrate, fashion.select, bad))


def share(value: float) -> Share:
    return Share(value=value, low=value, high=value, n=100)


def drop(value: float, high: float) -> Drop:
    return Drop(value=value, standard_error=0.1, low=value, high=high, n=100)


@pytest.mark.parametrize(
    ("gate", "holds"),
    [
        (Gate("clean_drop", 2.0), True),
        (Gate("clean_drop", 1.4), False),
        (Gate("robust_drop", 3.0), True),
        (Gate("robust_drop", 2.9), False),
        (Gate("masking"), True),
    ],
)
def test_gates_are_held_against_the_upper_end(gate: Gate, holds: bool) -> None:
    ours = Row(
        name="qopt", code_bits=4, clean=share(90), robust=share(60), clean_drop=drop(1, 1.5),
        robust_drop=drop(2, 3.0), masking="none",
    )  # fmt: skip
    (found,) = judge((gate,), ours)
    assert found.holds is holds


def test_a_masked_network_fails_its_gate() -> None:
    ours = Row(name="qopt", code_bits=4, clean=share(90), clean_drop=drop(0, 0), masking="masked")
    (found,) = judge((Gate("masking"),), ours)
    assert not found.holds


@pytest.mark.parametrize("name", ["robust_drop", "masking"])
def test_gates_on_attacks_need_attacks(name: str) -> None:
    ours = Row(name="qopt", code_bits=4, clean=share(90), clean_drop=drop(0, 0))
    with pytest.raises(UsageError, match="add --robust"):
        judge((Gate(name, None if name == "masking" else 1.0),), ours)


def test_a_failed_gate_is_exit_code_1(example_onnx: Path, fashion: Data) -> None:
    bundle = optimize(
        example_onnx, data=fashion, gates=("clean_drop<=0",), **SMALL
    )  # fmt: skip
    assert bundle.exit_code == 1
    assert "gates fail: clean_drop<=0" in bundle.report.verdict


def test_naive_and_honest_rows_of_few_bit_activations(example_onnx: Path, fashion: Data) -> None:
    options = {**SMALL, "baselines": ("int4@int4",)}
    report = optimize(example_onnx, data=fashion, robust=True, **options).report
    rows = {row.name: row for row in report.rows}
    honest, naive = rows["uniform int4, activations int4"], rows["uniform int4, activations int4, naive evaluation"]
    assert honest.robust is not None
    assert naive.robust is not None
    assert naive.robust.value > honest.robust.value
    assert naive.masking == "masked"


class Dense(nn.Module):
    """Flattened images through two linear layers, one applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.shared = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        logits: torch.Tensor = self.last(x)
        return logits


@pytest.fixture
def tiny_data() -> Data:
    generator = np.random.default_rng(0)
    images = generator.random((60, 1, 4, 4), dtype=np.float32)
    part = Split(images, generator.integers(0, 3, 60))
    return Data(part, part, part)


@pytest.mark.parametrize("robust", [False, True])
def test_a_module_with_a_shared_layer(tiny_data: Data, robust: bool) -> None:
    torch.manual_seed(0)
    bundle = optimize(Dense(), data=tiny_data, robust=robust, eps=0.05, gates=(), **SMALL)
    assert [layer.name for layer in bundle.report.layers] == ["first.weight", "shared.weight", "last.weight"]
    assert bundle.report.layers[1].macs == 2 * 144
    assert bundle.report.kernels.integer == 4
    assert bundle.report.kernels.floating == 0


@pytest.mark.parametrize(("batch", "calibration"), [(7, "clean"), (7, "mixed"), (1, "clean")])
def test_a_network_that_takes_one_batch_size_only(
    tmp_path: Path, tiny_data: Data, batch: int, calibration: str
) -> None:
    """A class token that was folded at its batch ties the graph to it; 60 images are no multiple of 7 either."""
    torch.manual_seed(0)
    path = tmp_path / "static.onnx"
    path.write_bytes(static_network(batch).SerializeToString())
    bundle = optimize(path, data=tiny_data, robust=True, eps=0.05, gates=(), calibration=calibration, **SMALL)
    report = bundle.report
    assert report.model.batch == batch
    assert report.kernels.agreement is not None
    assert report.kernels.agreement > 0.9
    assert report.kernels.difference is not None
    assert any("one image at a time" in text for text in report.warnings) is (batch == 1)
    assert report.amplification is not None
    assert report.amplification.images % batch == 0


def static_network(batch: int) -> onnx.ModelProto:
    """Tied to ``batch`` by a token for each image, and to 1 by a view of all pixels, as torch exports some poolings."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(1)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.normal(size=shape).astype(np.float32) / 4, name)

    tensors = [constant("w", 16, 8), constant("v", 8, 3), constant("token", batch, 8)]
    tensors += [
        numpy_helper.from_array(np.array(entries), f"to{len(entries)}") for entries in ([batch * 16], [batch, 16])
    ]
    nodes = [
        helper.make_node("Reshape", ["x", "to1"], ["line"]),
        helper.make_node("Reshape", ["line", "to2"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["h"]),
        helper.make_node("Add", ["h", "token"], ["t"]),
        helper.make_node("Relu", ["t"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 4, 4])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])
    graph = helper.make_graph(nodes, "static", [image], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_file_that_qopt_made_is_quantized_already(bundle: qopt.Bundle, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(bundle.model)
    with pytest.raises(UnsupportedModelError, match="quantized already; give the float model"):
        optimize(path)


def test_a_network_without_weights(tiny_data: Data) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2).mean(2).repeat(1, 3)

    with pytest.raises(UnsupportedModelError, match="no layer that can be quantized"):
        optimize(Mean(), data=tiny_data)
