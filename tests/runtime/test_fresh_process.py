"""A fresh process with ONNX Runtime and numpy only: what it gives back, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qopt.errors import VerificationError
from qopt.runtime import fresh
from qopt.runtime.kernels import count_kernels
from qopt.runtime.process import FOREIGN, run_fresh

WEIGHT = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
INPUT = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)


def product(weight: np.ndarray = WEIGHT, name: str = "in/put:0") -> bytes:
    image = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    nodes = [helper.make_node("MatMul", [name, "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [image], [out], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def test_outputs_kernels_sizes_and_times() -> None:
    model, other = product(), product(WEIGHT * 2)
    feeds: dict[str, np.ndarray] = {"in/put:0": INPUT, "unused": np.arange(3)}
    found = run_fresh({"one": {"m.onnx": model}, "two": {"m.onnx": other}}, feeds, items=2, seconds=0.01)
    (output,) = found.outputs
    np.testing.assert_allclose(output, INPUT @ WEIGHT, rtol=1e-5)
    assert found.kernels == count_kernels(model)
    assert found.bytes == {"one": len(model), "two": len(other)}
    assert set(found.seconds) == {"one", "two"}
    assert all(0 < seconds < 1 for seconds in found.seconds.values())


def test_data_beside_the_model_are_read_and_counted() -> None:
    proto = onnx.load_model_from_string(product())
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.onnx.data")
    model = proto.SerializeToString()
    found = run_fresh({"one": {"m.onnx": model, "m.onnx.data": data}}, {"in/put:0": INPUT}, items=None, seconds=0.0)
    np.testing.assert_allclose(found.outputs[0], INPUT @ WEIGHT, rtol=1e-5)
    assert found.bytes == {"one": len(model) + len(data)}


def sequence() -> bytes:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [6, 8])
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    out = helper.make_value_info("y", helper.make_sequence_type_proto(element))
    nodes = [helper.make_node("SplitToSequence", ["x"], ["y"], axis=0, keepdims=1)]
    graph = helper.make_graph(nodes, "g", [image], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def test_the_parts_of_a_sequence_come_in_their_place() -> None:
    found = run_fresh({"one": {"m.onnx": sequence()}}, {"x": INPUT}, items=None, seconds=0.0)
    np.testing.assert_array_equal(np.concatenate(found.outputs), INPUT)


@pytest.mark.parametrize(
    ("model", "feeds"),
    [
        (b"no model", {"in/put:0": INPUT}),
        (product(), {"other": INPUT}),
        (product(), {"in/put:0": INPUT[:, :3]}),
        (product(), {"in/put:0": INPUT.astype(np.float64)}),
    ],
    ids=["bytes", "name", "shape", "type"],
)
def test_a_file_that_does_not_run_is_an_error_with_its_reason(model: bytes, feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(VerificationError, match="does not run in a fresh process") as caught:
        run_fresh({"one": {"m.onnx": model}}, feeds, items=None)
    assert caught.value.got


def test_the_process_loads_nothing_else() -> None:
    """Its file is run by its path: qopt, which would find torch, is not even looked at."""
    code = f"import runpy, sys; runpy.run_path({fresh.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(FOREIGN)


def test_more_modules_than_it_may_load_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(fresh.__file__).read_text().replace("import numpy as np", "import numpy as np\nimport qopt", 1)
    (tmp_path / "fresh.py").write_text(script)
    monkeypatch.setattr(fresh, "__file__", str(tmp_path / "fresh.py"))
    with pytest.raises(VerificationError, match="loaded more than") as caught:
        run_fresh({"one": {"m.onnx": product()}}, {"in/put:0": INPUT}, items=None, seconds=0.0)
    assert caught.value.got == "qopt"


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_rounds_are_bounded(seconds: float) -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> Callable[[], None]:
        def call() -> None:
            calls[name] += 1

        return call

    fresh.fastest({name: count(name) for name in calls}, seconds)
    assert set(calls.values()) == {fresh.FEWEST_ROUNDS if seconds == 0 else fresh.MOST_ROUNDS}
