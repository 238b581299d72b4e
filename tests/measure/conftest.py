"""The embedded example, loaded once, and small networks written as ONNX text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper, parser

from qopt.data import Data, load_data
from qopt.emit import emit
from qopt.graph.load import load_model
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.measure.network import ArtefactClassifier, Normalisation, TwinClassifier
from qopt.quantize import Quantizer
from qopt.runtime.session import Runner, to_bytes

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def data() -> Data:
    """Fashion-MNIST, 2000 images to learn from and 2000 to report."""
    return load_data(str(EXAMPLES / "fashion.npz"))


@pytest.fixture(scope="session")
def example(data: Data) -> Quantizer:
    """The embedded residual network, calibrated on 100 images."""
    model = load_model(EXAMPLES / "fashion_resnet.pt", factory=None, trust=False, input_shape=None)
    return Quantizer(prepare(model), torch.from_numpy(data.calibrate.images[:100]))


def _twin(quantizer: Quantizer) -> TwinClassifier:
    return TwinClassifier(copy.deepcopy(quantizer.float_graph), batch=quantizer.prepared.batch)


@pytest.fixture(scope="session")
def twin_of() -> Callable[[Quantizer], TwinClassifier]:
    """The float network over a private copy of its graph."""
    return _twin


def _artefact(prepared: Prepared, quantized: Quantized | None = None) -> ArtefactClassifier:
    model = prepared.model if quantized is None else emit(prepared, quantized)
    return ArtefactClassifier(Runner(to_bytes(model), batch=prepared.batch), Normalisation())


@pytest.fixture(scope="session")
def artefact_of() -> Callable[..., ArtefactClassifier]:
    """The file, float or quantized, in ONNX Runtime."""
    return _artefact


NETWORKS = {
    "conv": """(float[n,2,6,6] x, float[4,2,3,3] w1, float[4] b1, float[4,2,3,3] w2, float[9,5] w3, float[5] b3)
            => (float[n,5] y) <int64[2] s = {0, 9}, int64[1] axis = {1}> {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1], strides = [2,2], group = 2> (r1, w2)
        m = ReduceMean <keepdims = 0> (c2, axis)
        f = Reshape (m, s)
        p = MatMul (f, w3)
        y = Add (p, b3)
    }""",
    "shared": """(float[n,3,4,4] x, float[3,3,3,3] w, float[3] b, float[4,48] w2) => (float[n,4] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w, b)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w, b)
        f = Flatten (c2)
        y = Gemm <transB = 1> (f, w2)
    }""",
    "dynamic": """(float[n,2,4,4] x, float[4,32] w, float[4] b) => (float[n,4] y) {
        f = Flatten (x)
        g = Gemm <transB = 1> (f, w, b)
        y = Tanh (g)
    }""",
    "static": """(float[3,2,4,4] x, float[4,32] w, float[4] b, float[3,4] zeros) => (float[3,4] y) {
        f = Flatten (x)
        g = Gemm <transB = 1> (f, w, b)
        a = Add (g, zeros)
        y = Tanh (a)
    }""",
}
"""``static`` is ``dynamic`` bound to three images at a time."""


def _network(text: str) -> Prepared:
    proto = parser.parse_model('<ir_version: 10, opset_import: ["": 21]>\nnet ' + text)
    generator = np.random.default_rng(2)
    for value in list(proto.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        scale = 0.0 if value.name == "zeros" else float(np.prod(shape[1:])) ** -0.5
        array = (scale * generator.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return prepare(ir.serde.deserialize_model(proto))


@pytest.fixture(scope="session")
def network() -> Callable[[str], Prepared]:
    """From ONNX text to a prepared network with random weights; ``zeros`` are zeros."""
    return _network


@pytest.fixture(scope="session")
def networks() -> dict[str, Quantizer]:
    """All `NETWORKS`, calibrated on 13 images."""
    prepared = {name: _network(text) for name, text in NETWORKS.items()}
    return {name: Quantizer(net, _images(net, 13)) for name, net in prepared.items()}


def _images(prepared: Prepared, count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, *prepared.input_shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def images() -> Callable[..., torch.Tensor]:
    """Random images that a prepared network takes."""
    return _images
