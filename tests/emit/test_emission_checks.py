"""The emitter's own check: a layer that the plan quantizes and the file does not is an error, not a report line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qopt.emit import emit
from qopt.emit.additions import Additions
from qopt.emit.biases import write_bias
from qopt.emit.editor import _check_every_layer
from qopt.errors import VerificationError
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.runtime.values import constant
from qopt.spec import FLOAT, WeightSpec


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_a_planted_float_layer_is_caught(op: str, one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer(op)
    quantized = Quantized(codes_of(prepared, "int4"))
    model = emit(prepared, quantized)
    _check_every_layer(model, prepared, quantized)  # the honest file passes
    planted = constant("l.weight again", prepared.initializer("l.weight"))
    model.graph.initializers["l.weight again"] = planted
    next(n for n in model.graph if "qopt.layer" in n.metadata_props).replace_input_with(1, planted)
    with pytest.raises(VerificationError, match=r"^l\.weight: layers that the plan quantizes are still float"):
        _check_every_layer(model, prepared, quantized)
    with pytest.raises(VerificationError, match="still float"):
        _check_every_layer(prepared.model, prepared, quantized)
    _check_every_layer(model, prepared, Quantized())  # a plan that leaves the layer float is content


def test_a_layer_whose_node_is_gone_is_caught(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Conv")
    quantized = Quantized(codes_of(prepared, "int4"))
    model = emit(prepared, quantized)
    next(n for n in model.graph if "qopt.layer" in n.metadata_props).name = "renamed"
    with pytest.raises(VerificationError, match="still float"):
        _check_every_layer(model, prepared, quantized)


def test_one_of_two_uses_left_float_is_caught(graph: Any, codes_of: Any) -> None:
    g = graph((16,))
    g.random("l.weight", 16, 16)
    g.op("MatMul", ["x", "l.weight"], "a", name="first")
    g.op("MatMul", ["a", "l.weight"], "b", name="second")
    g.head("b")
    prepared = g.prepared()
    quantized = Quantized(codes_of(prepared, "int4"))
    model = emit(prepared, quantized)
    back = constant("l.weight", prepared.initializer("l.weight"))
    model.graph.initializers["l.weight"] = back
    next(n for n in model.graph if n.name == "second").replace_input_with(1, back)
    with pytest.raises(VerificationError, match="still float"):
        _check_every_layer(model, prepared, quantized)


def test_a_bias_that_moved_is_an_error(one_layer: Callable[..., Prepared]) -> None:
    """The graph and the layers found in it must belong together."""
    prepared = one_layer("MatMul")
    layer: Layer = prepared.layers[0]
    model: ir.Model = prepared.model.clone()
    nodes = {node.name: node for node in model.graph}
    nodes["l_add"].replace_input_with(1, constant("other", np.zeros(10, np.float32)))
    with pytest.raises(VerificationError, match=r"l: the bias of a layer is not where it was found"):
        write_bias(Additions(model.graph), nodes["l"], layer, layer.uses[0], np.zeros(10, np.float32))


def test_what_a_quantization_says_of_its_layers(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Conv")
    quantized = Quantized(codes_of(prepared, "log3:tensor"))
    assert quantized.spec("l.weight") == WeightSpec.parse("log3:tensor")
    assert quantized.spec("another") == FLOAT
    (stored,) = quantized.stored(prepared)
    assert (stored.weights, stored.channels, stored.spec) == (216, 6, WeightSpec.parse("log3:tensor"))
    (stored,) = Quantized().stored(prepared)
    assert stored.spec.is_float


def test_weights_that_share_a_table_must_have_the_same() -> None:
    """A planted mistake: a quantizer whose table depends on the weight; the second would read the first one's."""
    additions = Additions(ir.Graph([], [], nodes=[], name="g"))
    first = additions.shared("qopt/x_levels", np.array([0, 1], np.int8))
    assert additions.shared("qopt/x_levels", np.array([0, 1], np.int8)) is first
    with pytest.raises(VerificationError, match="qopt/x_levels: weights of one format have different tables"):
        additions.shared("qopt/x_levels", np.array([0, 2], np.int8))
