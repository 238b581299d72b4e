"""Cross-layer equalisation: the same function with even ranges, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.graph import equalise as module
from qopt.graph.compare import TOLERANCE, difference, random_images
from qopt.graph.digest import digest
from qopt.graph.equalise import equalise
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.quant import quantize_weight
from qopt.spec import WeightSpec

Run = Callable[[ir.Model, NDArray[np.float32]], NDArray[Any]]
Build = Callable[[Any], str]


def uneven(g: Any, *shape: int, axis: int = 0, name: str | None = None) -> str:
    """A random weight whose channels differ in range by up to a factor of a thousand."""
    factors = np.exp(g.generator.uniform(-3.5, 3.5, shape[axis]))
    array = g.generator.standard_normal(shape) * factors.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return str(g.constant(array * 0.1, name))


def ranges(prepared: Prepared, name: str, axis: int) -> NDArray[np.float64]:
    array = np.abs(prepared.initializer(name).astype(np.float64))
    result: NDArray[np.float64] = array.max(tuple(a for a in range(array.ndim) if a != axis))
    return result


def bytes_of(prepared: Prepared) -> bytes:
    return bytes(ir.serde.serialize_model(prepared.model).SerializeToString())


class TestOnePair:
    """Two layers, against equation 11 by hand."""

    @pytest.mark.parametrize("between", ["Relu", "LeakyRelu", "Identity", "nothing"])
    def test_both_get_the_geometric_mean(self, between: str, graph: Any, run: Run) -> None:
        g = graph()
        data = g.op("Conv", "x", uneven(g, 6, 3, 3, 3, name="a"), g.random(6, name="ab"))
        data = data if between == "nothing" else g.op(between, data)
        data = g.op("Conv", data, uneven(g, 4, 6, 1, 1, axis=1, name="b"), g.random(4, name="bb"))
        prepared = prepare(g.model(g.op("Flatten", data)))
        before = bytes_of(prepared)
        found, notes = equalise(prepared)
        r1, r2 = ranges(prepared, "a", 0), ranges(prepared, "b", 1)
        np.testing.assert_allclose(ranges(found, "a", 0), np.sqrt(r1 * r2), rtol=1e-6)
        np.testing.assert_allclose(ranges(found, "b", 1), np.sqrt(r1 * r2), rtol=1e-6)
        scale = np.sqrt(r1 * r2) / r2
        np.testing.assert_allclose(found.initializer("ab"), prepared.initializer("ab") / scale, rtol=1e-5)
        assert np.array_equal(found.initializer("bb"), prepared.initializer("bb"))
        assert notes == ["1 pair of layers equalised in 2 rounds"]
        images = random_images((3, 8, 8), 3, seed=4)
        assert difference(run(found.model, images), run(prepared.model, images)) <= TOLERANCE
        assert bytes_of(prepared) == before, "the network it was given stays"
        assert found.digest == digest(found.model, found.layers) != prepared.digest
        assert found.layers == prepared.layers

    def test_it_helps_one_scale_per_tensor(self, graph: Any, run: Run) -> None:
        """What the method is for: the outputs under 4-bit weights with one scale per tensor come closer to float."""
        g = graph()
        data = g.op("Relu", g.op("Conv", "x", uneven(g, 16, 3, 3, 3, name="a")))
        prepared = prepare(g.model(g.op("Flatten", g.op("Conv", data, g.random(8, 16, 3, 3, name="b")))))
        images = random_images((3, 8, 8), 3)
        expected = run(prepared.model, images)
        errors = []
        for network in (prepared, equalise(prepared)[0]):
            model = network.model.clone()
            for name in ("a", "b"):
                weight = torch.from_numpy(network.initializer(name).copy())
                codes = quantize_weight(weight, WeightSpec.parse("int4:tensor"))
                model.graph.initializers[name].const_value = ir.tensor(codes.dequantize().numpy(), name=name)
            errors.append(float(np.square(run(model, images) - expected).mean()))
        assert errors[1] < 0.5 * errors[0]

    def test_again_changes_nothing(self, graph: Any) -> None:
        g = graph()
        data = g.op("Relu", g.op("Conv", "x", uneven(g, 6, 3, 3, 3)))
        found, _ = equalise(prepare(g.model(g.op("Flatten", g.op("Conv", data, g.random(4, 6, 1, 1))))))
        again, notes = equalise(found)
        assert again is found
        assert notes == []


def _depthwise(g: Any) -> str:
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 1, 1), g.random(4)))
    data = g.op("Relu", g.op("Conv", data, uneven(g, 4, 1, 3, 3), g.random(4), group=4, pads=[1] * 4))
    return str(g.op("Conv", data, uneven(g, 5, 4, 1, 1, axis=1)))


def _multiplied(g: Any) -> str:
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 1, 1)))
    data = g.op("Conv", data, uneven(g, 8, 1, 3, 3), g.random(8), group=4)
    return str(g.op("Conv", data, uneven(g, 6, 4, 1, 1), group=2))


def _pooled(g: Any) -> str:
    data = g.op("Conv", "x", uneven(g, 4, 3, 3, 3), g.random(4), pads=[1] * 4, strides=[2, 2])
    data = g.op("MaxPool", data, kernel_shape=[3, 3], pads=[1] * 4)
    data = g.op("AveragePool", g.op("LeakyRelu", data, alpha=0.2), kernel_shape=[2, 2], pads=[1, 0, 0, 1])
    return str(g.op("Conv", data, uneven(g, 5, 4, 1, 1, axis=1)))


def _flattened(g: Any) -> str:
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 3, 3), g.random(4), strides=[2, 2]))
    return str(g.op("Gemm", g.op("Flatten", data), g.random(5, 36), g.random(5), transB=1))


def _flattened_the_other_way(g: Any) -> str:
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 3, 3), g.random(4), strides=[2, 2]))
    return str(g.op("Gemm", g.op("Flatten", data), g.random(36, 5), g.random(5)))


def _reshaped(g: Any) -> str:
    data = g.op("GlobalAveragePool", g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 3, 3))))
    return str(g.op("MatMul", g.op("Reshape", data, g.ints(-1, 4)), g.random(4, 5)))


def _squeezed(g: Any) -> str:
    data = g.op("GlobalMaxPool", g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 3, 3))))
    return str(g.op("Gemm", g.op("Squeeze", data, g.ints(2, 3)), g.random(4, 5)))


def _products(g: Any) -> str:
    data = g.op("MatMul", g.op("Flatten", "x"), uneven(g, 192, 6, axis=1))
    data = g.op("Relu", g.op("Add", data, g.random(6)))
    data = g.op("Gemm", data, uneven(g, 7, 6, axis=1), g.random(1, 7), transB=1)
    return str(g.op("MatMul", g.op("Relu", data), uneven(g, 7, 5)))


def _tokens(g: Any) -> str:
    data = g.op("Relu", g.op("MatMul", g.op("Reshape", "x", g.ints(-1, 12, 16)), uneven(g, 16, 6, axis=1)))
    return str(g.op("Flatten", g.op("MatMul", data, uneven(g, 6, 5))))


EQUALISED: dict[str, tuple[Build, int]] = {
    "depthwise": (_depthwise, 2),
    "depthwise with a multiplier, then grouped": (_multiplied, 2),
    "pools with padding": (_pooled, 1),
    "flatten": (_flattened, 1),
    "flatten, weight stored the other way": (_flattened_the_other_way, 1),
    "reshape after a global pool": (_reshaped, 1),
    "squeeze after a global pool": (_squeezed, 1),
    "products": (_products, 2),
    "tokens": (_tokens, 1),
}


@pytest.mark.parametrize("name", EQUALISED)
def test_equalised(name: str, graph: Any, run: Run) -> None:
    build, count = EQUALISED[name]
    g = graph()
    logits = build(g)
    prepared = prepare(g.model(g.op("Flatten", logits)))
    found, notes = equalise(prepared)
    assert notes[0].startswith(f"{count} pair"), notes
    images = random_images((3, 8, 8), 4, seed=9)
    assert difference(run(found.model, images), run(prepared.model, images)) <= TOLERANCE
    pairs = module._pairs(found.model, found.layers)
    assert len(pairs) == count
    for pair in pairs:
        tensors = module._Tensors(found.model)
        assert module._balance(pair, tensors) < 1e-3, "every pair of a chain has settled"


def _clipped(g: Any) -> str:
    data = g.op("Clip", g.op("Conv", "x", uneven(g, 4, 3, 1, 1)), g.constant(0.0), g.constant(6.0))
    return str(g.op("Conv", data, g.random(5, 4, 1, 1)))


def _sloped(g: Any) -> str:
    data = g.op("PRelu", g.op("Conv", "x", uneven(g, 4, 3, 1, 1)), g.random(4, 1, 1))
    return str(g.op("Conv", data, g.random(5, 4, 1, 1)))


def _sigmoid(g: Any) -> str:
    return str(g.op("Conv", g.op("Sigmoid", g.op("Conv", "x", uneven(g, 4, 3, 1, 1))), g.random(5, 4, 1, 1)))


def _residual(g: Any) -> str:
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 3, 3, 1, 1)))
    return str(g.op("Add", g.op("Conv", data, g.random(3, 3, 1, 1)), data))


def _shared_weight(g: Any) -> str:
    weight = uneven(g, 3, 3, 1, 1)
    return str(g.op("Conv", g.op("Relu", g.op("Conv", "x", weight)), weight))


def _shared_bias(g: Any) -> str:
    bias = g.random(3)
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 3, 3, 1, 1), bias))
    return str(g.op("Conv", data, g.random(3, 3, 1, 1), bias))


def _added(g: Any) -> str:
    data = g.op("Add", g.op("Conv", "x", uneven(g, 4, 3, 1, 1)), g.random(4, 8, 8))
    return str(g.op("Conv", data, g.random(5, 4, 1, 1)))


def _up(g: Any) -> str:
    data = g.op("Relu", g.op("ConvTranspose", "x", uneven(g, 3, 4, 1, 1, axis=1)))
    return str(g.op("Conv", data, g.random(5, 4, 1, 1)))


def _turned(g: Any) -> str:
    """The channels of a convolution end up last: a product over them is not what the code follows."""
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 1, 1)))
    return str(g.op("MatMul", g.op("Transpose", data, perm=[0, 2, 3, 1]), g.random(4, 5)))


def _along_the_width(g: Any) -> str:
    """A product over the width of an image, which is as wide as the convolution has channels."""
    return str(g.op("MatMul", g.op("Relu", g.op("Conv", "x", uneven(g, 8, 3, 1, 1))), g.random(8, 5)))


def _mixed_by_a_reshape(g: Any) -> str:
    data = g.op("Relu", g.op("Conv", "x", uneven(g, 4, 3, 1, 1)))
    return str(g.op("MatMul", g.op("Reshape", data, g.ints(0, -1, 4)), g.random(4, 5)))


def _flattened_tokens(g: Any) -> str:
    """Features of a token follow each other here, not those of a channel."""
    data = g.op("Relu", g.op("MatMul", g.op("Reshape", "x", g.ints(-1, 12, 16)), uneven(g, 16, 6, axis=1)))
    return str(g.op("Gemm", g.op("Flatten", data), g.random(72, 5)))


LEFT: list[Build] = [
    _clipped, _sloped, _sigmoid, _residual, _shared_weight, _shared_bias, _added, _up, _turned, _along_the_width,
    _mixed_by_a_reshape, _flattened_tokens,
]  # fmt: skip


@pytest.mark.parametrize("build", LEFT)
def test_left_alone(build: Build, graph: Any) -> None:
    g = graph()
    prepared = prepare(g.model(g.op("Flatten", build(g))))
    found, notes = equalise(prepared)
    assert found is prepared
    assert notes == []


class TestDeadChannels:
    """Channels that one side does not use."""

    def test_their_scale_is_one(self, graph: Any, run: Run) -> None:
        g = graph()
        first, second = (g.generator.standard_normal(s).astype(np.float32) for s in ((5, 3, 1, 1), (4, 5, 1, 1)))
        first[1], second[:, 3] = 0, 0
        first[4] *= 1e-9
        data = g.op("Conv", "x", g.constant(first, "a"), g.random(5, name="ab"))
        prepared = prepare(g.model(g.op("Flatten", g.op("Conv", g.op("Relu", data), g.constant(second, "b")))))
        found, _ = equalise(prepared)
        for name, axis in (("a", 0), ("b", 1)):
            old, new = (np.moveaxis(p.initializer(name), axis, 0) for p in (prepared, found))
            assert np.array_equal(old[[1, 3, 4]], new[[1, 3, 4]])
            assert not np.array_equal(old[[0, 2]], new[[0, 2]])
        assert np.array_equal(found.initializer("ab")[[1, 3, 4]], prepared.initializer("ab")[[1, 3, 4]])
        images = random_images((3, 8, 8), 3)
        assert difference(run(found.model, images), run(prepared.model, images)) <= TOLERANCE

    def test_a_layer_of_zeros(self, graph: Any) -> None:
        g = graph()
        data = g.op("Relu", g.op("Conv", "x", g.constant(np.zeros((4, 3, 1, 1))), g.random(4)))
        prepared = prepare(g.model(g.op("Flatten", g.op("Conv", data, g.random(5, 4, 1, 1)))))
        assert equalise(prepared) == (prepared, [])


def test_what_computes_something_else_is_undone(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake, a Clip taken for homogeneous, is caught by the comparison in ONNX Runtime."""
    monkeypatch.setattr(module, "_ELEMENTWISE", module._ELEMENTWISE | {"Sigmoid"})
    g = graph()
    prepared = prepare(g.model(g.op("Flatten", _sigmoid(g))))
    found, notes = equalise(prepared)
    assert found is prepared
    assert notes[0].startswith("cross-layer equalisation undone: relative difference ")


@st.composite
def networks(draw: st.DrawFn, graph: Any) -> ir.Model:
    g = graph((2, 8, 8), batch=draw(st.sampled_from(["n", 1, 2])))
    channels, data, size = 2, "x", 8
    for _ in range(draw(st.integers(1, 4))):
        depthwise = draw(st.booleans())
        wanted = channels * draw(st.integers(1, 2)) if depthwise else draw(st.sampled_from([2, 4]))
        groups = channels if depthwise else draw(st.sampled_from([1, 2]))
        stride = draw(st.integers(1, 2)) if size > 2 else 1
        inputs = [data, uneven(g, wanted, channels // groups, 3, 3)]
        inputs += [g.random(wanted)] if draw(st.booleans()) else []
        convolved = g.op("Conv", *inputs, group=groups, strides=[stride] * 2, pads=[1] * 4)
        size, before = (size + stride - 1) // stride, data
        kind = draw(st.sampled_from(["Relu", "LeakyRelu", "MaxPool", "AveragePool", "Sigmoid", "Add", "nothing"]))
        if kind in ("MaxPool", "AveragePool"):
            data = g.op(kind, convolved, kernel_shape=[3, 3], pads=[1] * 4)
        elif kind == "Add" and (wanted, stride) == (channels, 1):
            data = g.op("Add", convolved, before)
        else:
            data = convolved if kind in ("nothing", "Add") else g.op(kind, convolved)
        channels = wanted
    if draw(st.booleans()):
        data, size = g.op("GlobalAveragePool", data), 1
    flat = g.op("Flatten", data)
    hidden = g.op("Relu", g.op("Gemm", flat, g.random(6, channels * size**2), g.random(6), transB=1))
    model: ir.Model = g.model(g.op("MatMul", hidden, g.random(6, 5)))
    return model


@settings(max_examples=50)
@given(data=st.data())
def test_random_networks_compute_the_same(data: st.DataObject, graph: Any, run: Run) -> None:
    prepared = prepare(data.draw(networks(graph)))
    found, notes = equalise(prepared)
    images = random_images((2, 8, 8), 4, seed=3)
    assert notes, "at least the two products are a pair"
    assert "undone" not in notes[0]
    assert difference(run(found.model, images), run(prepared.model, images)) <= 3 * TOLERANCE
    for name in prepared.model.graph.initializers:
        assert np.isfinite(found.initializer(name)).all()
