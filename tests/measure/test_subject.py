"""Model files of every kind as things to attack: the file itself, and a twin with gradients where it has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from qopt.emit import emit
from qopt.errors import ModelError, UnsupportedModelError, UsageError
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.measure.network import Normalisation
from qopt.measure.subject import Subject, open_subject
from qopt.plan import uniform
from qopt.quantize import Quantizer
from qopt.runtime.session import to_bytes
from qopt.spec import ActivationSpec, WeightSpec

TextModel = Callable[..., onnx.ModelProto]
HEAD = "g (float[n, 1, 6, 6] x) => (float[n, 4] y)"
PLAIN = HEAD + " { c = Conv <pads = [1, 1, 1, 1]> (x, k, b) a = Relu(c) f = Flatten(a) y = Gemm(f, w, d) }"
NORMED = (
    HEAD
    + """ {
    c = Conv <pads = [1, 1, 1, 1]> (x, k) m = BatchNormalization(c, b, b2, b3, b4) a = Relu(m) f = Flatten(a)
    y = Gemm(f, w, d)
}"""
)
ROUNDED = (
    HEAD
    + """ {
    c = Conv <pads = [1, 1, 1, 1]> (x, k, b) a = Relu(c) q = QuantizeLinear(a, s, z) r = DequantizeLinear(q, s, z)
    f = Flatten(r) y = Gemm(f, w, d)
}"""
)
REFUSED = (
    HEAD
    + """ {
    i = CenterCropPad <axes = [1, 2, 3]> (x, size) c = Conv <pads = [1, 1, 1, 1]> (i, k, b) a = Relu(c) f = Flatten(a)
    y = Gemm(f, w, d)
}"""
)
TEXT = "g (int64[n, 6] x) => (float[n, 6, 4] y) { y = Gather(t, x) }"
FIXED = "g (float[2, 36] x) => (float[2, 4] y) { y = Gemm(x, v, d) }"
ANY_SIZE = "g (float[n, 1, h, h2] x) => (float[n, 1, 1, 1] y) { y = GlobalAveragePool(x) }"
SIZELESS = "g (float[n, 1, h, h2] x) => (float[n, 1, 1, 1] y) { r = RandomUniformLike(x) y = GlobalAveragePool(r) }"


def arrays(width: int = 5) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return {
        "k": normal(width, 1, 3, 3), "b": normal(width) * 0.1, "w": normal(36 * width, 4) * 0.1, "d": normal(4),
        "v": normal(36, 4), "t": normal(9, 4), "size": np.array([1, 6, 6]),
        "s": np.array(0.8, np.float32), "z": np.array(0, np.uint8),
        "b2": normal(width) * 0.1, "b3": normal(width) * 0.1, "b4": np.ones(width, np.float32),
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path, text_model: TextModel) -> Callable[..., Path]:
    def write(graph: str, name: str = "net", width: int = 5) -> Path:
        used = {key: value for key, value in arrays(width).items() if f"{key})" in graph or f"{key}," in graph}
        onnx.save(text_model(graph, **used), tmp_path / f"{name}.onnx")
        return tmp_path / f"{name}.onnx"

    return write


def opened(path: Path, **options: Any) -> Subject:
    return open_subject(path, Normalisation(), **options)


def images(count: int = 12) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def oracle(path: Path, sample: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": image[None].numpy()})[0] for image in sample])


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.feeds = iter([{"x": images(40).numpy()}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantized(path: Path, form: QuantFormat) -> Path:
    out = path.with_name(f"{path.stem}_{form.name.lower()}.onnx")
    quantize_static(str(path), str(out), Reader(), quant_format=form)
    return out


@pytest.mark.parametrize(("graph", "staircase"), [(PLAIN, False), (NORMED, False), (ROUNDED, True)])
def test_file_and_twin_compute_the_same(write: Callable[..., Path], graph: str, staircase: bool) -> None:
    path = write(graph)
    subject = opened(path)
    sample = images()
    assert (subject.name, subject.input_shape, subject.no_twin) == ("net", (1, 6, 6), "")
    assert subject.staircase is staircase
    expected = oracle(path, sample)
    np.testing.assert_allclose(subject.artefact(sample).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(subject.gradients(sample).detach().numpy(), expected, atol=1e-5)


def test_gradients_reach_the_image_and_nothing_else(write: Callable[..., Path]) -> None:
    subject = opened(write(ROUNDED))
    sample = images().requires_grad_()
    subject.gradients(sample).sum().backward()  # type: ignore[no-untyped-call]
    assert sample.grad is not None
    assert float(sample.grad.abs().max()) > 0
    assert subject.twin is not None
    assert not [p for p in subject.twin.graph.parameters() if p.requires_grad]


def test_normalisation_lies_before_both(write: Callable[..., Path]) -> None:
    path, sample = write(PLAIN), images()
    subject = open_subject(path, Normalisation((0.3,), (0.5,)))
    expected = oracle(path, (sample - 0.3) / 0.5)
    np.testing.assert_allclose(subject.artefact(sample).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(subject.gradients(sample).numpy(), expected, atol=1e-4)


def test_an_operator_that_the_importer_refuses_leaves_the_queries(write: Callable[..., Path]) -> None:
    path, sample = write(REFUSED), images()
    subject = opened(path)
    assert subject.twin is None
    assert "CenterCropPad" in subject.no_twin
    assert not subject.staircase
    assert (subject.input_shape, subject.outline) == ((1, 6, 6), ())
    np.testing.assert_allclose(subject.artefact(sample).numpy(), oracle(path, sample), atol=1e-5)
    with pytest.raises(UnsupportedModelError, match=r"net: the model has no gradients .*CenterCropPad"):
        subject.gradients(sample)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (TEXT, "net: no classifier of images (got its input 'x' is INT64)"),
        (ANY_SIZE, "net: no classifier of images (got its input 'x' is no image of one size"),
        (SIZELESS, "net: no classifier of images (expected one float input of a known size"),
    ],
)
def test_what_classifies_no_images_is_refused(write: Callable[..., Path], graph: str, words: str) -> None:
    with pytest.raises(ModelError) as found:
        opened(write(graph))
    assert words in str(found.value)


def test_a_fixed_batch_takes_any_number_of_images(write: Callable[..., Path]) -> None:
    path, sample = write(FIXED), images(5).reshape(5, 36)
    subject = opened(path)
    expected = sample.numpy() @ arrays()["v"] + arrays()["d"]
    np.testing.assert_allclose(subject.artefact(sample).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(subject.gradients(sample).numpy(), expected, atol=1e-5)


def test_a_file_of_onnxruntime_in_qdq_form(write: Callable[..., Path]) -> None:
    path = write(PLAIN)
    subject, sample = opened(quantized(path, QuantFormat.QDQ)), images(200)
    assert subject.staircase
    same = subject.gradients(sample).argmax(1) == subject.artefact(sample).argmax(1)
    assert same.float().mean() >= 0.99
    assert subject.outline == opened(path).outline, "quantized, and its ReLU absorbed, it is the same structure"


def test_a_file_of_onnxruntime_in_operators_of_its_own(write: Callable[..., Path]) -> None:
    subject = opened(quantized(write(PLAIN), QuantFormat.QOperator))
    assert subject.twin is None
    assert "com.microsoft" in subject.no_twin
    assert subject.artefact(images()).shape == (12, 4)


def test_a_file_of_qopt(write: Callable[..., Path], tmp_path: Path) -> None:
    prepared = prepare(load_model(write(PLAIN)))
    applied = Quantizer(prepared, images(40)).apply(uniform(WeightSpec.parse("int4"), ActivationSpec.parse("int4")))
    (tmp_path / "emitted.onnx").write_bytes(to_bytes(emit(prepared, applied.quantized)))
    subject, sample = opened(tmp_path / "emitted.onnx"), images(200)
    assert subject.staircase
    assert subject.outline == opened(write(PLAIN)).outline
    same = subject.gradients(sample).argmax(1) == subject.artefact(sample).argmax(1)
    assert same.float().mean() >= 0.99


class TestStructure:
    def test_batch_norm_folded_or_not_is_the_same(self, write: Callable[..., Path]) -> None:
        assert opened(write(NORMED, "a")).outline == opened(write(PLAIN, "b")).outline

    def test_another_width_is_another_one(self, write: Callable[..., Path]) -> None:
        assert opened(write(PLAIN, "a")).outline != opened(write(PLAIN, "b", width=6)).outline


class TestDigests:
    def test_equal_files_have_equal_ones(self, write: Callable[..., Path]) -> None:
        first, second, third = opened(write(PLAIN, "a")), opened(write(PLAIN, "b")), opened(write(ROUNDED, "c"))
        assert (first.digest, first.content) == (second.digest, second.content)
        assert third.digest != first.digest
        assert third.content != first.content

    def test_weights_beside_the_file_count(self, tmp_path: Path, text_model: TextModel) -> None:
        found = []
        for name, width in (("a", 1.0), ("b", 2.0)):
            folder = tmp_path / name
            folder.mkdir()
            used = {key: value for key, value in arrays().items() if key in "kbwd"}
            used["w"] = used["w"] * np.float32(width)
            onnx.save(
                text_model(PLAIN, **used), folder / "net.onnx", save_as_external_data=True, location="w.bin",
                size_threshold=0,
            )  # fmt: skip
            found.append(opened(folder / "net.onnx"))
        assert found[0].digest == found[1].digest
        assert found[0].content != found[1].content

    def test_what_a_factory_builds_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4){more})\n"
        monkeypatch.syspath_prepend(tmp_path)
        found = []
        for name, more in (("subject_nets_a", ""), ("subject_nets_b", ", nn.ReLU()")):
            (tmp_path / f"{name}.py").write_text(code.format(more=more))
            torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)).state_dict(), tmp_path / "s.pt")
            found.append(opened(tmp_path / "s.pt", factory=f"{name}:make", input_shape=(1, 6, 6)))
        assert found[0].content != found[1].content
        assert found[1].gradients(images()).min() >= 0


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [("none.onnx", None, UsageError), ("bad.onnx", b"\x08\x07garbage", ModelError), ("text.onnx", b"hi", ModelError)],
)
def test_files_that_are_no_models(tmp_path: Path, name: str, content: bytes | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=name):
        opened(tmp_path / name)
