"""The whole way of networks that are no classifiers of images: text, detectors, operators that the twin lacks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

import qopt
from qopt.data import Data, Split
from qopt.errors import DataError, PlanError, UnsupportedModelError, UsageError
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import quiet
from qopt.quantize import WeightOnly

pytestmark = pytest.mark.long

WORDS, WIDTH, LONGEST = 2000, 128, 64
UNIFORM: dict[str, Any] = {"target": "int4-uniform", "search": "uniform"}


class Attention(nn.Module):
    """Multi-head attention written out; ``causal`` hides what comes later."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        count, length, _ = x.shape
        q, k, v = (f(x).view(count, length, 4, WIDTH // 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // 4)
        if hidden is not None:
            scores = scores + hidden
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        result: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, length, WIDTH))
        return result


class Layer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.attention, self.first, self.second = Attention(causal), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.first(x + self.attention(x, hidden))
        result: Tensor = self.second(x + self.down(nn.functional.gelu(self.up(x))))
        return result


class Encoder(nn.Module):
    """Like BERT: three tables of embeddings, a mask, two layers, a classifier and the states."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place, self.kind = (
            nn.Embedding(WORDS, WIDTH, 0),
            nn.Embedding(LONGEST, WIDTH),
            nn.Embedding(2, WIDTH),
        )
        self.layers = nn.ModuleList(Layer(False) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(input_ids.shape[1])
        x = self.word(input_ids) + self.place(places) + self.kind(token_type_ids)
        hidden = (1 - attention_mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, hidden)
        return self.head(x[:, 0]), x


class Decoder(nn.Module):
    """Like GPT: a causal mask, and an output layer that shares the table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(Layer(True) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.word.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.word(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


class Text:
    """A module with its ONNX file."""

    def __init__(self, module: nn.Module, path: Path, inputs: int) -> None:
        self.module, self.path, self.inputs = module.eval(), path, inputs
        batch, length = Dim("batch"), Dim("length", max=LONGEST)
        shapes = tuple({0: batch, 1: length} for _ in range(inputs))
        with quiet():
            made = torch.onnx.export(
                self.module, tuple(torch.from_numpy(array) for array in self.feeds(2, 12).values()), dynamo=True,
                opset_version=20, dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
        assert made is not None
        made.save(path)

    def feeds(self, count: int, length: int) -> dict[str, NDArray[Any]]:
        generator = np.random.default_rng(length)
        feeds = {
            "input_ids": generator.integers(0, WORDS, (count, length)),
            "attention_mask": (np.arange(length) < length - 2).astype(np.int64)[None].repeat(count, 0),
            "token_type_ids": generator.integers(0, 2, (count, length)),
        }
        return dict(list(feeds.items())[: self.inputs])

    def quantized(self, bundle: qopt.Bundle) -> nn.Module:
        """The module in torch with the weights that the plan gives it: an oracle that knows nothing of the file."""
        prepared = prepare(load_model(self.path))
        codes = WeightOnly(prepared).apply(bundle.plan).quantized.weights
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            for layer in prepared.layers:
                values = codes[layer.name].dequantize()
                module.get_parameter(layer.name).copy_(values.t() if layer.op == "MatMul" else values)
        return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Text:
    torch.manual_seed(0)
    return Text(Encoder(), folder / "encoder.onnx", 3)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Text:
    torch.manual_seed(0)
    return Text(Decoder(), folder / "decoder.onnx", 1)


@pytest.fixture(scope="module")
def encoded(encoder: Text) -> qopt.Bundle:
    return qopt.optimize(encoder.path, **UNIFORM)


@pytest.fixture(scope="module")
def decoded(decoder: Text) -> qopt.Bundle:
    return qopt.optimize(decoder.path, **UNIFORM)


def _run(model: bytes, feeds: dict[str, NDArray[Any]]) -> list[Any]:
    return list(onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds))


def _agrees(got: Any, expected: Any) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize(("count", "length"), [(1, 1), (3, 20), (2, LONGEST)])
def test_the_file_computes_the_network_with_quantized_weights(
    name: str, count: int, length: int, request: pytest.FixtureRequest
) -> None:
    text: Text = request.getfixturevalue(name)
    bundle: qopt.Bundle = request.getfixturevalue(name.replace("er", "ed"))
    feeds = text.feeds(count, length)
    with torch.no_grad():
        arguments = [torch.from_numpy(array) for array in feeds.values()]
        expected, plain = text.quantized(bundle)(*arguments), text.module(*arguments)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    found = _run(bundle.model, feeds)
    assert len(found) == len(wanted)
    assert all(_agrees(got, other.numpy()) for got, other in zip(found, wanted, strict=True))
    assert not _agrees(found[-1], (plain if isinstance(plain, Tensor) else plain[-1]).numpy())


@pytest.mark.parametrize("name", ["encoded", "decoded"])
def test_four_bits_are_a_sixth_of_float(name: str, request: pytest.FixtureRequest) -> None:
    bundle: qopt.Bundle = request.getfixturevalue(name)
    assert bundle.report.size.code_bits == 4
    assert bundle.report.size.file_bytes == len(bundle.model)
    assert bundle.report.size.ratio <= 1 / 6


def test_every_weight_of_a_text_encoder_is_a_layer(encoded: qopt.Bundle) -> None:
    rows = {row.name: (row.op, row.shape, row.macs) for row in encoded.report.layers}
    assert list(rows)[:3] == ["word.weight", "place.weight", "kind.weight"]
    assert rows["word.weight"] == ("Gather", [WORDS, WIDTH], 0)
    assert rows["head.weight"] == ("Gemm", [3, WIDTH], 3 * WIDTH)
    assert sum(op == "MatMul" for op, _, _ in rows.values()) == 12
    assert rows["layers.0.attention.query.weight"][2] == 16 * WIDTH**2, "of one text of 16 words"


def test_a_shared_table_is_one_layer_and_stored_once(decoded: qopt.Bundle) -> None:
    tied = [row for row in decoded.report.layers if row.shape == [WORDS, WIDTH]]
    assert [(row.op, row.macs) for row in tied] == [("Gather", 16 * WORDS * WIDTH)]
    large = [t for t in onnx.load_from_string(decoded.model).graph.initializer if math.prod(t.dims) >= WORDS * WIDTH]
    assert [(tensor.data_type, len(tensor.raw_data)) for tensor in large] == [
        (onnx.TensorProto.INT4, WORDS * WIDTH // 2)
    ]


def test_what_the_report_says(encoded: qopt.Bundle, decoded: qopt.Bundle, tmp_path: Path) -> None:
    reason = "not attacked: it takes 3 inputs: 'input_ids', 'attention_mask', 'token_type_ids'"
    assert reason in encoded.report.left_out
    assert encoded.report.verdict.endswith(f"{reason}.")
    assert "not attacked: its input 'input_ids' is INT64" in decoded.report.left_out
    assert not any("--data" in item for item in encoded.report.left_out)
    assert encoded.exit_code == 0
    assert (encoded.report.rows, encoded.report.activations, encoded.report.robust_accuracy) == ([], [], None)
    assert "input_ids INT64 (?, ?)" in encoded.report.model.notes[0]
    encoded.write(tmp_path / "out")
    assert reason in (tmp_path / "out" / "report.md").read_text()
    assert list(json.loads((tmp_path / "out" / "manifest.json").read_text())["latency_seconds"]) == ["2"]


def test_a_row_of_zeros_for_padding_is_no_warning(encoded: qopt.Bundle) -> None:
    assert not any("word.weight" in warning for warning in encoded.report.warnings)


def test_robust_searches_by_weight_errors_under_the_papers_thresholds(decoder: Text) -> None:
    report = qopt.optimize(decoder.path, robust=True).report
    assert report.search.thresholds == "paper"
    assert report.search.sensitivity == "squared relative error of the weights, no data"
    assert report.size.code_bits <= 4
    assert len({row.norm_dw for row in report.layers}) > 1
    assert report.gates_hold


def test_the_same_run_gives_the_same_bytes_and_so_does_its_plan(encoder: Text, encoded: qopt.Bundle) -> None:
    again = qopt.optimize(encoder.path, **UNIFORM)
    assert again.model == encoded.model
    assert again.report.to_json() == encoded.report.to_json()
    assert qopt.optimize(encoder.path, plan=encoded.plan).model == encoded.model


def test_a_plan_that_quantizes_activations(encoder: Text, encoded: qopt.Bundle) -> None:
    plan = encoded.plan.with_changes(defaults={"weights": "int4", "activations": "int8"})
    with pytest.raises(PlanError, match=r"asks for more than weights .*it takes 3 inputs"):
        qopt.optimize(encoder.path, plan=plan)


def _images() -> Data:
    generator = np.random.default_rng(0)
    part = Split(generator.random((20, 3, 8, 8), dtype=np.float32), generator.integers(0, 3, 20))
    return Data(part, part, part)


@pytest.mark.parametrize("robust", [False, True])
def test_images_for_a_network_that_takes_none(encoder: Text, robust: bool) -> None:
    with pytest.raises(DataError) as caught:
        qopt.optimize(encoder.path, data=_images(), robust=robust)
    assert "attacks and activation quantization need one float image in and logits out" in str(caught.value)
    assert "it takes 3 inputs" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"rounding": "gptq"}, "--rounding: GPTQ needs images"),
        ({"gates": ("clean_drop<=1",)}, "--gate: gates are measured on images"),
        ({"thresholds": "weighted"}, "--thresholds: weighted thresholds weigh by the inputs of layers"),
    ],
)
def test_options_that_need_images(encoder: Text, options: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError) as caught:
        qopt.optimize(encoder.path, **options)
    assert option in str(caught.value)
    assert "leave it out: no image can be run through the network, it takes 3 inputs" in str(caught.value)
    assert "give --data" not in str(caught.value)


def test_equalisation_is_for_images(encoder: Text) -> None:
    with pytest.raises(UsageError, match="--equalisation: equalisation is for classifiers of images"):
        qopt.optimize(encoder.path, equalisation="on")


def _random(*shape: int) -> NDArray[np.float32]:
    return np.asarray(np.random.default_rng(sum(shape)).standard_normal(shape) / 4, np.float32)


DETECTOR = """
g (float[b, 3, h, w] x) => (float[b, 2, h2, w2] boxes, int64[b, h2, w2] kinds) {
    c = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, conv)
    n = BatchNormalization(c, scale, shift, shift, scale)
    r = Relu(n)
    d = Conv<group = 16, pads = [1, 1, 1, 1]>(r, deep)
    boxes = Conv(d, box)
    scores = Conv(d, score)
    kinds = ArgMax<axis = 1, keepdims = 0>(scores)
}
"""


def test_a_detector_of_any_size_with_two_outputs(text_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    path = tmp_path / "detector.onnx"
    arrays = {
        "conv": _random(16, 3, 3, 3), "scale": np.ones(16, np.float32), "shift": _random(16),
        "deep": _random(16, 1, 3, 3), "box": _random(2, 16, 1, 1), "score": _random(90, 16, 1, 1),
    }  # fmt: skip
    path.write_bytes(text_model(DETECTOR, **arrays).SerializeToString())
    bundle = qopt.optimize(path, target="int8", search="uniform")
    assert [row.name for row in bundle.report.layers] == ["conv", "deep", "box", "score"]
    assert "not attacked: its input 'x' is no image of one size but (?, 3, ?, ?)" in bundle.report.left_out
    feeds: dict[str, NDArray[Any]] = {"x": np.random.default_rng(0).random((1, 3, 40, 22), np.float32)}
    (boxes, kinds), (plain, _) = _run(bundle.model, feeds), _run(path.read_bytes(), feeds)
    assert boxes.shape == (1, 2, 20, 11)
    assert kinds.dtype == np.int64
    assert 0 < np.abs(boxes - plain).max() < 0.05 * np.abs(plain).max()


UNKNOWN = """
g (float[b, 3, 8, 8] x) => (float[b, 3] y) {
    blocks = Reshape(x, blocked)
    joined = Col2Im<strides = [2, 2]>(blocks, size, block)
    flat = Flatten(joined)
    y = Gemm<transB = 1>(flat, w)
}
"""


@pytest.fixture
def unknown(text_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> Path:
    """A classifier of images with an operator that the twin does not have."""
    path = tmp_path / "unknown.onnx"
    arrays = {"blocked": np.array([0, 12, 16]), "size": np.array([8, 8]), "block": np.array([2, 2])}
    path.write_bytes(text_model(UNKNOWN, w=_random(3, 192), **arrays).SerializeToString())
    return path


def test_an_operator_that_the_twin_lacks(unknown: Path) -> None:
    bundle = qopt.optimize(unknown, **UNIFORM)
    (reason,) = [item for item in bundle.report.left_out if item.startswith("not attacked")]
    assert reason.startswith("not attacked: operator Col2Im (opset 21)")
    assert "node '" in reason
    assert bundle.report.model.classes == 3
    assert bundle.report.size.code_bits == 4
    feeds: dict[str, NDArray[Any]] = {"x": np.random.default_rng(0).random((2, 3, 8, 8), np.float32)}
    assert np.abs(_run(bundle.model, feeds)[0] - _run(unknown.read_bytes(), feeds)[0]).max() < 2


def test_images_for_an_operator_that_the_twin_lacks(unknown: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"operator Col2Im .* can still be emitted weight-only, not attacked"
    ):
        qopt.optimize(unknown, data=_images())


def test_nothing_to_quantize(text_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    path = tmp_path / "left.onnx"
    text = "g (float[b, 6, 4] x) => (float[b, 3, 4] y) { y = MatMul(w, x) }"
    path.write_bytes(text_model(text, w=_random(3, 6)).SerializeToString())
    with pytest.raises(UnsupportedModelError, match="no layer that can be quantized"):
        qopt.optimize(path)
