"""Random tiny networks: whatever the shapes and curves, float32 never leaves the bounds."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.certificates.backward import Backward
from qopt.certificates.ball import Ball
from qopt.certificates.interval import intervals
from qopt.certificates.read import read
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import ThreatModel

from .conftest import parse, scattered, values_of

CURVES = {
    "Relu (a)": "", "LeakyRelu <alpha = 0.3> (a)": "", "Sigmoid (a)": "", "Tanh (a)": "", "Softplus (a)": "",
    "HardSigmoid (a)": "", "Clip (a, low, high)": "", "MaxPool <kernel_shape = [2,2], pads = [1,0,0,1]> (a)": "",
    "AveragePool <kernel_shape = [2,2], pads = [0,1,1,0]> (a)": "", "Erf (a)": "",
}  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, int, float]:
    channels, width, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(3, 4))
    stride, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    curve, other = draw(st.sampled_from(list(CURVES))), draw(st.sampled_from(["Relu", "Tanh", "Neg"]))
    join = draw(st.sampled_from(["Add (b, c)", "Sub (b, c)", "Concat <axis = 1> (b, c)", "Identity (b)"]))
    text = f"""(float[n,{channels},{size},{size}] x, float[{width},{channels},{kernel},{kernel}] w1, float[{width}] b1,
            float[{width},{channels},{kernel},{kernel}] w2) => (float[n,2] y)
            <float low = {{-0.3}}, float high = {{0.4}}, float[2] t = {{0.1, -0.2}},
            int64[1] last = {{-1}}> {{
        a = Conv <strides = [{stride},1]> (x, w1, b1)
        p = {curve}
        d = Conv <strides = [{stride},1]> (x, w2)
        e = {other} (d)
        bg = GlobalAveragePool (p)
        cg = GlobalMaxPool (e)
        b = Flatten (bg)
        c = Flatten (cg)
        j = {join}
        s = ReduceMean <keepdims = 1> (j, last)
        m = ReduceSum <keepdims = 1> (b, last)
        q = Concat <axis = 1> (s, m)
        y = Add (q, t)
    }}"""
    return text, draw(st.integers(0, 10_000)), draw(st.sampled_from([1e-6, 0.3, 2.0, 1e4]))


@settings(max_examples=40)
@given(networks(), st.sampled_from([ThreatModel("linf", 0.0), ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)]))
def test_random_points_stay_inside(drawn: tuple[str, int, float], threat: ThreatModel) -> None:
    text, seed, size = drawn
    prepared = prepare(parse(text, seed, size))
    twin = build_twin(prepared)
    images = torch.rand(2, *prepared.input_shape, generator=torch.Generator().manual_seed(seed))
    network, ball = read(twin, prepared.input_shape), Ball.around(images, threat)
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, -1.0], [-0.5, 2.0]])
    backward, plain = Backward(network, ball), intervals(network, ball)
    lower = backward.lower(rows.expand(2, -1, -1))
    assert bool(torch.isfinite(lower).all())
    last = {step.name: place for place, step in enumerate(network.steps)}
    for points in [images, *scattered(images, threat, 8, seed)]:
        values = values_of(twin, points)
        for name, place in last.items():
            for boxes in (plain, backward.boxes):
                value = values[name].double()
                assert bool(((boxes[place].low <= value) & (value <= boxes[place].high)).all()), name
        logits = values[network.steps[-1].name].double()
        assert bool((lower <= logits @ rows.double().T).all())


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 6), st.floats(0.001, 0.3))
def test_the_margin_of_a_two_layer_network(seed: int, width: int, pixels: int, eps: float) -> None:
    """Against numpy in float64, at every corner of the ball: an oracle that shares no code."""
    text = f"""(float[n,{pixels}] x, float[{width},{pixels}] w1, float[{width}] b1, float[2,{width}] w2)
            => (float[n,2] y) {{ h = Gemm <transB = 1> (x, w1, b1) r = Relu (h) y = Gemm <transB = 1> (r, w2) }}"""
    prepared = prepare(parse(text, seed))
    image = np.random.default_rng(seed).random((1, pixels)).astype(np.float32)
    low, high = np.clip(image - eps, 0, 1)[0], np.clip(image + eps, 0, 1)[0]
    bits = (np.arange(2**pixels)[:, None] >> np.arange(pixels)) & 1
    corners = np.where(bits == 1, high, low).astype(np.float64)
    w1, b1, w2 = (prepared.initializer(name).astype(np.float64) for name in ("w1", "b1", "w2"))
    logits = np.maximum(corners @ w1.T + b1, 0) @ w2.T
    network = read(build_twin(prepared), (pixels,))
    ball = Ball.around(torch.from_numpy(image), ThreatModel("linf", eps))
    found = float(Backward(network, ball).lower(torch.tensor([[[1.0, -1.0]]])))
    assert found <= float((logits[:, 0] - logits[:, 1]).min()) + 1e-9
    assert math.isfinite(found)
