"""What a user must know and would otherwise miss: each a warning of one line that names the place, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import qopt
from qopt.data import Data, Split
from qopt.emit import editor
from qopt.errors import VerificationError
from qopt.graph.model import Layer
from qopt.plan import Plan

pytestmark = pytest.mark.long

Floats = NDArray[np.float32]
QUICK: dict[str, Any] = {"baselines": (), "bias_correction": "off"}


def weights(seed: int = 0) -> dict[str, Floats]:
    """Of a network of two convolutions and a linear layer, 1x6x6 pixels to 3 classes."""
    g = np.random.default_rng(seed)
    shapes = {"c1": (4, 1, 3, 3), "b1": (4,), "c2": (6, 4, 3, 3), "fc": (24, 3)}
    return {name: g.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def network(folder: Path, arrays: dict[str, Floats]) -> Path:
    nodes = [
        helper.make_node("Conv", ["x", "c1", "b1"], ["a"]),
        helper.make_node("Relu", ["a"], ["r1"]),
        helper.make_node("Conv", ["r1", "c2"], ["d"]),
        helper.make_node("Relu", ["d"], ["r2"]),
        helper.make_node("Flatten", ["r2"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["y"]),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 6, 6])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "small", [image], [logits], tensors)
    path = folder / "small.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    return path


def images(count: int) -> Data:
    g = np.random.default_rng(1)
    part = Split(g.random((count, 1, 6, 6), dtype=np.float32), g.integers(0, 3, count))
    return Data(part, part, part)


def warnings(path: Path, **options: Any) -> list[str]:
    return qopt.optimize(path, **{**QUICK, **options}).report.warnings


def matching(found: list[str], *words: str) -> list[str]:
    return [line for line in found if all(word in line for word in words)]


@pytest.mark.parametrize(
    ("count", "options", "named"),
    [
        (3, {}, 3),
        (31, {}, 31),
        (32, {}, None),
        (60, {"calibration_images": 8}, 8),
        (60, {}, None),
        (3, {"activations": "float"}, None),
        (3, {"activations": "float", "bias_correction": "on"}, 3),
        (3, {"plan": Plan(weights={"*": "int4"})}, None),
        (3, {"plan": Plan(weights={"*": "int4"}, rounding="gptq")}, 3),
        (3, {"plan": Plan(activations={"r1": "int8"}, ranges={"r1": (0.0, 1.0)})}, None),
        (3, {"plan": Plan(activations={"r1": "int8"})}, 3),
    ],
)
def test_few_calibration_images(tmp_path: Path, count: int, options: dict[str, Any], named: int | None) -> None:
    """Only where something was calibrated on them."""
    found = matching(warnings(network(tmp_path, weights()), data=images(count), **options), "calibrated on")
    assert len(found) == (named is not None)
    assert named is None or f"calibrated on {named} images only" in found[0]


@pytest.mark.parametrize("dead", [[], [0], [1, 3]])
@pytest.mark.parametrize("layer", ["c1", "c2", "fc"])
def test_constant_output_channels_of_the_model(tmp_path: Path, layer: str, dead: list[int]) -> None:
    arrays = weights()
    axis = 1 if layer == "fc" else 0
    dead = [channel for channel in dead if channel < arrays[layer].shape[axis]]
    for channel in dead:
        np.moveaxis(arrays[layer], axis, 0)[channel] = 0
    found = matching(warnings(network(tmp_path, arrays)), "constant")
    assert len(found) == bool(dead)
    if dead:
        words = f"layer {layer}: {len(dead)} of {arrays[layer].shape[axis]} output channels are constant"
        assert found[0].startswith(words)


def test_channels_that_rounding_makes_constant(tmp_path: Path) -> None:
    """One scale for the whole tensor, and a channel a hundred times smaller than the others."""
    arrays = weights()
    arrays["c2"][2] *= 0.01
    arrays["c2"][4] = 0
    path = network(tmp_path, arrays)
    found = warnings(path, plan=Plan(weights={"c2": "int3:tensor:max"}))
    assert matching(found, "layer c2: 1 of 6 output channels are constant", "remove them from the model")
    assert matching(found, "layer c2: 1 of 6 output channels became constant", "int3:tensor:max", "scale per channel")
    by_channel = warnings(path, plan=Plan(weights={"c2": "int3:max"}))
    assert not matching(by_channel, "became constant")
    assert not matching(warnings(path, plan=Plan()), "became constant")


def test_a_constant_activation(tmp_path: Path) -> None:
    """The first ReLU is dead: everything behind it sees zeros."""
    arrays = weights()
    arrays["b1"][:] = -100
    path = network(tmp_path, arrays)
    found = matching(warnings(path, data=images(40)), "activation", "constant")
    assert [line.split()[1] for line in found] == ["r1", "r2"]
    assert "is constant (0) on the calibration images" in found[0]
    given = Plan(activations={"r1": "int8"}, ranges={"r1": (0.0, 0.0)})
    assert not matching(warnings(path, plan=given), "activation"), "a range that the user wrote was not calibrated"
    assert not matching(warnings(network(tmp_path, weights()), data=images(40)), "activation")


def test_a_file_that_does_not_shrink(tmp_path: Path, example_onnx: Path) -> None:
    path = network(tmp_path, weights())
    bundle = qopt.optimize(path, data=images(40), **QUICK)
    (found,) = matching(bundle.report.warnings, "not smaller")
    assert f"({len(bundle.model)} against {path.stat().st_size} bytes)" in found
    assert not matching(warnings(example_onnx), "not smaller")


def test_every_warning_is_one_line(tmp_path: Path) -> None:
    arrays = weights()
    arrays["b1"][:] = -100
    arrays["c2"][0] = 0
    found = warnings(network(tmp_path, arrays), data=images(3))
    assert len(found) >= 5
    assert all(line == " ".join(line.split()) for line in found)


@pytest.mark.parametrize("with_data", [True, False])
def test_a_layer_that_comes_out_float_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_data: bool
) -> None:
    """A planted fault: the emitter forgets one layer. The job must stop, whatever kernels the layer would run on."""
    honest = editor._Job._replace_weight

    def forgetful(job: editor._Job, layer: Layer, packed: Any) -> None:
        if layer.name != "c2":
            honest(job, layer, packed)

    path = network(tmp_path, weights())
    options: dict[str, Any] = {**QUICK, "data": images(40) if with_data else None, "plan": Plan(weights={"*": "int4"})}
    assert qopt.optimize(path, **options).report.layers[1].format == "int4"
    monkeypatch.setattr(editor._Job, "_replace_weight", forgetful)
    with pytest.raises(VerificationError, match="c2: layers that the plan quantizes are still float") as caught:
        qopt.optimize(path, out=tmp_path / "out", **options)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_the_honest_file_holds_codes_for_every_layer(tmp_path: Path) -> None:
    """The oracle behind the error: no initializer of the emitted file is a float copy of a quantized weight."""
    bundle = qopt.optimize(network(tmp_path, weights()), plan=Plan(weights={"*": "int4"}))
    stored = {t.name: t for t in onnx.load_from_string(bundle.model).graph.initializer}
    assert not {"c1", "c2", "fc"} & {name for name, t in stored.items() if t.data_type == TensorProto.FLOAT}
