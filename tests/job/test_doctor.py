"""`qopt doctor`: a diagnosis of everything that loads, and of everything that does not."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qopt
from qopt.errors import QoptError, UsageError
from qopt.job.doctor import Diagnosis, diagnose, show_diagnosis

pytestmark = pytest.mark.long

NETS = """
import torch
from torch import nn

def text():
    return nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 24)), torch.zeros(2, 5, dtype=torch.int64)

def images():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = images()
    def forward(self, x):
        if x.sum() > 0:
            return self.layers(x)
        return self.layers(-x)
"""
TEXT = "g (int64[b, s] ids) => (float[b, s, 12] y) { x = Gather(table, ids) y = MatMul(x, w) }"
PLAIN = "g (float[n, 1, 4, 4] x) => (float[n, 3] y) { f = Flatten(x) y = MatMul(f, w) }"
UNKNOWN = "g (float[n, 1, 4, 4] x) => (float[n, 3] y) { f = Flatten(x) s = Unique (f) z = ReduceSum <keepdims = 0> (s) b = Add(f, z) y = MatMul(b, w) }"  # noqa: E501
STACKED = "g (float[n, 2, 4, 4] x) => (float[n, 2, 4, 3] y) { y = MatMul(x, w) }"
SCALED = "g (float[n, 16] x) => (float[n, 3] y) { h = Gemm <alpha = 0.5> (x, v) y = MatMul(h, w) }"
NO_LAYER = "g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }"
RANDOM = "g (float[n, 4] x) => (float[n, 4] y) { r = RandomNormalLike(x) y = Add(x, r) }"
FIXED = "g (float[2, 16] x) => (float[2, 3] y) { c = Constant <value = int64[2] {2, 16}> () f = Reshape(x, c) y = MatMul(f, w) }"  # noqa: E501


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "doctor_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "doctor_nets", raising=False)
    return tmp_path


@pytest.fixture
def onnx_file(text_model: Callable[..., onnx.ModelProto], folder: Path) -> Callable[..., Path]:
    def write(graph: str, **arrays: np.ndarray) -> Path:
        onnx.save(text_model(graph, **arrays), folder / "model.onnx")
        return folder / "model.onnx"

    return write


def test_a_classifier_of_images(onnx_file: Callable[..., Path]) -> None:
    path = onnx_file(PLAIN, w=normal(16, 3))
    found = diagnose(path)
    assert (found.exit_code, found.reason, found.compiles) == (0, "", True)
    assert (found.file, found.format, found.opset) == (str(path), "ONNX model", 21)
    assert [(t.name, t.dtype, t.shape) for t in found.inputs] == [("x", "FLOAT", ["n", 1, 4, 4])]
    assert [(t.name, t.dtype, t.shape) for t in found.outputs] == [("y", "FLOAT", ["n", 3])]
    assert found.operators == {"Flatten": 1, "MatMul": 1}
    assert [(x.name, x.op, x.shape, x.weights, x.share) for x in found.layers] == [("w", "MatMul", [16, 3], 48, 1.0)]
    assert (found.kept, found.others, found.attacked, found.unattacked) == ((), 0, True, "")
    assert found.batch == "any size"
    assert found.bytes["float"] == 48 * 4
    assert found.bytes["int8"] == 48 + 3 * 4


def test_an_operator_that_the_twin_lacks_is_why_nothing_is_attacked(onnx_file: Callable[..., Path]) -> None:
    found = diagnose(onnx_file(UNKNOWN, w=normal(16, 3)))
    assert found.compiles
    assert not found.attacked
    assert "Unique" in found.unattacked
    assert "attacks     no: " in show_diagnosis(found)


def test_text(onnx_file: Callable[..., Path]) -> None:
    found = diagnose(onnx_file(TEXT, table=normal(30, 8), w=normal(8, 12)))
    assert [x.name for x in found.layers] == ["table", "w"]
    assert [round(x.share, 3) for x in found.layers] == [round(240 / 336, 3), round(96 / 336, 3)]
    assert sum(x.share for x in found.layers) == pytest.approx(1, abs=1e-5)
    assert (found.attacked, found.batch) == (False, "as the file declares it")
    assert found.unattacked == "its input 'ids' is INT64"


def test_weights_that_stay_in_float_and_why(onnx_file: Callable[..., Path]) -> None:
    found = diagnose(onnx_file(SCALED, v=normal(16, 8), w=normal(8, 3)))
    assert [(x.name, x.weights, x.reason) for x in found.kept] == [
        ("v", 128, "Gemm with scaling or a transposed left side")
    ]
    assert [x.name for x in found.layers] == ["w"]
    assert not any("stays in float" in note for note in found.notes)
    assert found.bytes["float"] == 4 * (128 + 24)
    assert found.bytes["int8"] == 4 * 128 + 24 + 3 * 4


def test_what_is_no_weight_is_counted(onnx_file: Callable[..., Path]) -> None:
    graph = "g (float[n, 16] x) => (float[n, 3] y) { m = MatMul(x, w) z = Add(m, b) y = Mul(z, s) }"
    found = diagnose(onnx_file(graph, w=normal(16, 3), b=normal(3), s=normal(3)))
    assert (found.others, found.layers[0].share) == (6, round(48 / 54, 6))
    assert "all else  6  biases, norms and constants" in show_diagnosis(found)


def test_a_batch_that_cannot_be_freed(onnx_file: Callable[..., Path]) -> None:
    graph = "g (float[2, 16] x) => (float[2, 3] y) { m = MatMul(x, w) y = Add(m, c) }"
    assert diagnose(onnx_file(graph, w=normal(16, 3), c=normal(2, 3))).batch == "fixed to 2"
    found = diagnose(onnx_file(FIXED, w=normal(16, 3)))
    assert found.batch == "any size"
    assert "batch axis made dynamic" in found.notes


REFUSED: dict[str, tuple[str, dict[str, np.ndarray], str, str]] = {
    "no layer": (NO_LAYER, {}, "no layer that can be quantized", "Relu"),
    "random": (RANDOM, {}, "draws random numbers", "RandomNormalLike"),
    "not finite": (PLAIN, {"w": normal(16, 3) * np.float32("nan")}, "NaN", "MatMul"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_graphs_are_told_with_what_is_known(name: str, onnx_file: Callable[..., Path]) -> None:
    graph, arrays, words, operator = REFUSED[name]
    found = diagnose(onnx_file(graph, **arrays))
    assert found.exit_code == 3
    assert words in found.reason
    assert operator in found.operators
    assert found.layers == ()
    assert show_diagnosis(found).endswith(f"cannot be compiled: {found.reason}\n")


def test_a_refusal_for_want_of_layers_says_why_weights_stay(onnx_file: Callable[..., Path]) -> None:
    found = diagnose(onnx_file(STACKED, w=normal(2, 4, 3)))
    assert found.exit_code == 3
    assert [(x.name, x.reason) for x in found.kept] == [("w", "MatMul by a stack of matrices")]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def image_state() -> dict[str, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).state_dict()


FILES: dict[str, tuple[Callable[[], bytes], dict[str, Any], int, str, str]] = {
    "safetensors": (
        lambda: safetensors.torch.save(image_state()), {"factory": "doctor_nets:images", "input_shape": (1, 4, 4)}, 0,
        "safetensors file", "",
    ),
    "no factory": (lambda: safetensors.torch.save(image_state()), {}, 2, "safetensors file", "--model"),
    "no shape": (
        lambda: saved(image_state()), {"factory": "doctor_nets:images"}, 2, "state dict", "--input-shape",
    ),
    "wrong factory": (lambda: saved(image_state()), {"factory": "doctor_nets:imags"}, 2, "state dict", "images"),
    "wrong shape": (
        lambda: saved(image_state()), {"factory": "doctor_nets:images", "input_shape": (1, 9, 9)}, 3, "state dict",
        "torch.export cannot trace",
    ),
    "other weights": (
        lambda: saved({"a": torch.zeros(2)}), {"factory": "doctor_nets:images"}, 2, "state dict", "do not fit",
    ),
    "untraceable": (
        lambda: saved({f"layers.{k}": v for k, v in image_state().items()}),
        {"factory": "doctor_nets:Branch", "input_shape": (1, 4, 4)}, 3, "state dict", "doctor_nets.py",
    ),
    "code": (lambda: saved(nn.Linear(2, 2)), {}, 3, "pickled module", "--trust"),
    "trusted code": (lambda: saved(nn.Linear(8, 3)), {"trust": True, "input_shape": (8,)}, 0, "pickled module", ""),
    "empty": (lambda: b"", {}, 3, "", "empty"),
    "text": (lambda: b"hello, world, this is no model", {}, 3, "", "not a model file"),
    "cut short": (lambda: safetensors.torch.save(image_state())[:-40], {"factory": "doctor_nets:images"}, 3,
                  "safetensors file", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, folder: Path) -> None:
    make, options, code, kind, words = FILES[name]
    (folder / "model.bin").write_bytes(make())
    found = diagnose("model.bin", **options)
    assert (found.exit_code, found.format) == (code, kind), found.reason
    assert words in found.reason
    assert bool(found.layers) == found.compiles == (code == 0)
    assert "Traceback" not in show_diagnosis(found)
    with pytest.raises(QoptError) if code else contextlib.nullcontext() as caught:
        qopt.optimize("model.bin", target="int4-uniform", search="uniform", **options)
    if code:
        assert caught is not None
        assert (str(caught.value), caught.value.exit_code) == (found.reason, code)


def test_no_file_is_an_error_and_no_diagnosis(folder: Path) -> None:
    for path in ("missing.onnx", "."):
        with pytest.raises(UsageError):
            diagnose(folder / path)


def test_the_example_agrees_with_the_report(examples: Path) -> None:
    """The diagnosis foretells what a run writes into its report."""
    found = diagnose(examples / "fashion_resnet.pt")
    report = qopt.optimize(examples / "fashion_resnet.pt", target="int4-uniform", search="uniform").report
    assert [(x.name, x.op, x.shape) for x in found.layers] == [(x.name, x.op, x.shape) for x in report.layers]
    assert sum(x.weights for x in found.layers) == report.model.weights
    assert set(found.notes) <= set(report.model.notes)
    assert found.exporter.startswith("pytorch")


def test_json_is_read_back(onnx_file: Callable[..., Path]) -> None:
    found = diagnose(onnx_file(SCALED, v=normal(16, 8), w=normal(8, 3)))
    content = json.loads(found.to_json())
    assert content["schema"] == 1
    assert Diagnosis.model_validate(content) == found


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qopt", "doctor", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_command(onnx_file: Callable[..., Path], folder: Path) -> None:
    onnx_file(SCALED, v=normal(16, 8), w=normal(8, 3))
    shown, parsed = run("model.onnx", cwd=folder), run("model.onnx", "--json", cwd=folder)
    assert (shown.returncode, parsed.returncode, shown.stderr) == (0, 0, "")
    assert shown.stdout == show_diagnosis(diagnose("model.onnx"))
    assert "\n1 layer that can be quantized\n  w  MatMul  8 x 3  24  15.8 %\n" in shown.stdout
    assert json.loads(parsed.stdout)["layers"][0]["name"] == "w"


def test_the_command_refuses(folder: Path) -> None:
    (folder / "text").write_text("hello, world\n")
    refused, missing = run("text", cwd=folder), run("nowhere", cwd=folder)
    assert (refused.returncode, refused.stderr) == (3, "")
    assert "cannot be compiled: text: not a model file that qopt knows" in refused.stdout
    assert (missing.returncode, missing.stdout) == (2, "")
    assert len(missing.stderr.splitlines()) == 1


def test_damaged_files_never_end_in_a_traceback(folder: Path) -> None:
    """Bytes of a good file changed at random: any diagnosis, or the right errors, but nothing else."""
    weight = numpy_helper.from_array(normal(16, 3), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in (("x", 16), ("y", 3))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    good = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    generator, codes = np.random.default_rng(1), set()
    for _ in range(40):
        content = bytearray(good)
        for place in generator.integers(0, len(good), 2):
            content[place] = generator.integers(0, 256)
        (folder / "model.onnx").write_bytes(content)
        found = diagnose(folder / "model.onnx")
        codes.add(found.exit_code)
        show_diagnosis(found)
        json.loads(found.to_json())
    assert codes <= {0, 3}
    assert 3 in codes
