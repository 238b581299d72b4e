"""The model of this machine: its networks fuse, its clock is stable, its regression finds what was put in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.cache import Cache
from qopt.errors import UsageError
from qopt.graph.prepare import prepare
from qopt.hardware import measured
from qopt.hardware.cost_model import LayerDescription, Step
from qopt.hardware.describe import describe
from qopt.hardware.measured import (
    FEATURES,
    MeasuredHost,
    fingerprint,
    fit,
    layer_features,
    network_features,
    step_features,
)
from qopt.hardware.microbenchmarks import (
    BATCH_SECONDS,
    Benchmark,
    Op,
    benchmarks,
    lowest_times,
    open_call,
    stable_seconds,
)
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import Runner, to_bytes
from qopt.spec import WeightSpec

INT4, INT8, FLOAT = WeightSpec.parse("int4"), WeightSpec.parse("int8"), WeightSpec.parse("float")
SMALL = Benchmark(
    3, 12, (Op("conv", 16), Op("conv", 16), Op("add"), Op("max", kernel=3, stride=2), Op("mean"), Op("gemm", 10))
)


def amount(found: NDArray[np.float64], feature: str) -> float:
    return float(found[FEATURES.index(feature)])


@pytest.fixture(scope="module")
def networks() -> tuple[Benchmark, ...]:
    return benchmarks()


def test_every_feature_is_learnt_from_many_networks(networks: tuple[Benchmark, ...]) -> None:
    few = networks[::3]
    found = np.array([network_features(describe(prepare(one.model(codes=False)), 32)) for one in few])
    assert (np.count_nonzero(found, axis=0) >= 2).all()
    assert np.linalg.matrix_rank(found / found.max(axis=0), tol=1e-6) == len(FEATURES)
    assert len(set(networks)) == len(networks)


def test_channels_are_multiples_of_sixteen(networks: tuple[Benchmark, ...]) -> None:
    assert all(op.channels % 16 == 0 for one in networks for op in one.ops if op.kind == "conv")
    assert all(one.channels <= 3 and one.ops[-1].channels == 10 for one in networks)


@pytest.mark.parametrize("one", [SMALL, *benchmarks()[::12]], ids=str)
def test_codes_run_on_integer_kernels(one: Benchmark) -> None:
    counts = count_kernels(to_bytes(one.model(codes=True))).counts
    kinds = [op.kind for op in one.ops]
    assert counts.get("QLinearConv", 0) == kinds.count("conv")
    assert counts.get("QGemm", 0) == kinds.count("gemm")
    assert counts.get("QLinearAdd", 0) == kinds.count("add")
    assert "Conv" not in counts
    assert "Gemm" not in counts


def test_benchmarks_compute(networks: tuple[Benchmark, ...]) -> None:
    for codes in (False, True):
        logits = Runner(to_bytes(SMALL.model(codes=codes)), batch=1)(SMALL.image)
        assert logits.shape == (1, 10)
        assert np.isfinite(logits).all()
        open_call(SMALL, codes=codes)()


def test_features_of_layers_by_hand(conv: Callable[..., LayerDescription]) -> None:
    found = layer_features(conv(16, 8))
    expected = {
        "layer": 1, "multiply": 2304 * 64, "output": 1024, "position": 64, "window": 576, "gathered": 9216,
        "weight": 2304,
    }  # fmt: skip
    assert {f: amount(found, f) for f in FEATURES if amount(found, f)} == expected
    depthwise = conv(16, 8, weight_shape=(16, 1, 3, 3), weights=144, macs=144 * 64, groups=16)
    found = layer_features(depthwise)
    assert (amount(found, "multiply depthwise"), amount(found, "multiply")) == (144 * 64, 0)
    assert amount(found, "gathered") == 9216
    stem = conv(16, 8, weight_shape=(16, 3, 3, 3), weights=432, macs=432 * 64)
    assert amount(layer_features(stem), "multiply few channels") == 432 * 64
    assert amount(layer_features(stem), "position few channels") == 64
    matrix = LayerDescription("m", "Gemm", (10, 64), 10, 640, 640, inputs=64, outputs=10)
    found = layer_features(matrix)
    assert {f: amount(found, f) for f in FEATURES if amount(found, f)} == {
        "layer": 1, "multiply matrix": 640, "output": 10, "position": 1, "weight": 640
    }  # fmt: skip
    point = conv(16, 8, weight_shape=(16, 16, 1, 1), kernel=(1, 1), weights=256, macs=256 * 64)
    assert amount(layer_features(point), "window") == amount(layer_features(point), "gathered") == 0


def test_features_of_steps_by_hand() -> None:
    added = step_features(Step("n", "Add", "", 200, 100, 8, ()))
    assert (amount(added, "step"), amount(added, "element added"), amount(added, "element pooled")) == (1, 200, 0)
    pooled = step_features(Step("n", "MaxPool", "", 400, 100, 8, ()))
    assert (amount(pooled, "element pooled"), pooled.sum()) == (400, 401)


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_the_regression_finds_what_was_put_in(seed: int) -> None:
    rng = np.random.default_rng(seed)
    amounts = rng.lognormal(0, 2, (60, len(FEATURES))) * 10.0 ** rng.integers(0, 7, len(FEATURES))
    true = 10.0 ** rng.uniform(-12, -6, len(FEATURES))
    seconds = amounts @ true
    found = fit(amounts, seconds)
    assert np.allclose(amounts @ found, seconds, rtol=1e-6)
    assert (found >= 0).all()
    noisy = fit(amounts, seconds * rng.uniform(0.95, 1.05, 60))
    assert np.abs(amounts @ noisy / seconds - 1).max() < 0.15


def test_a_feature_that_no_network_has_costs_nothing() -> None:
    amounts = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert fit(amounts, np.array([2.0, 4.0, 6.0])).tolist() == [2.0, 0.0]


class Clock:
    """CPU time that a call of a given cost lets pass, slower in some calls."""

    def __init__(self, seconds: float, slow: Callable[[int], float]) -> None:
        self.now, self.seconds, self.slow, self.calls = 0.0, seconds, slow, itertools.count()

    def call(self) -> None:
        self.now += self.seconds * self.slow(next(self.calls))

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", [2e-6, 1e-4, 3e-3, 0.05])
def test_the_least_time_is_found_beside_slow_moments(seconds: float) -> None:
    runs = max(1, round(BATCH_SECONDS / seconds))
    clock = Clock(seconds, lambda i: 3.0 if (i // (4 * runs)) % 2 == 0 else 1.0)
    assert stable_seconds(clock.call, clock) == pytest.approx(seconds, rel=0.02)


def test_passes_go_on_while_times_fall() -> None:
    """A machine that is slow for the whole of the first pass and as fast as it can be in the second."""
    first = Clock(1e-3, lambda i: 2.0 if i < 30 else 1.0)
    assert lowest_times([first.call], first, most=4)[0] == pytest.approx(1e-3, rel=0.02)
    steady = Clock(1e-3, lambda i: 1.0)
    lowest_times([steady.call], steady, most=4)
    twice = next(steady.calls)
    lowest_times([steady.call], steady, most=2)
    assert next(steady.calls) - twice == pytest.approx(twice, abs=2)  # a second pass settles it


def test_before_calibration_it_says_so(conv: Callable[..., LayerDescription]) -> None:
    with pytest.raises(UsageError, match=r"measured:host: the cost model is not calibrated; call calibrate"):
        MeasuredHost().layer_cost(conv(), INT4)
    assert MeasuredHost().constants == {}
    assert MeasuredHost().capabilities(conv(), (INT4,)) == (INT4,)


def test_calibration_is_kept_by_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fitted = {"floats": np.arange(1.0, len(FEATURES) + 1), "codes": np.arange(2.0, len(FEATURES) + 2)}

    def timed() -> dict[str, NDArray[np.float64]]:
        asked.append(1)
        return fitted

    monkeypatch.setattr(measured, "measure", timed)
    first = MeasuredHost().calibrate(Cache(tmp_path))
    again = MeasuredHost().calibrate(Cache(tmp_path))
    assert first == again == MeasuredHost(tuple(fitted["floats"].tolist()), tuple(fitted["codes"].tolist()))
    assert len(asked) == 1
    monkeypatch.setattr(measured, "fingerprint", lambda: {"machine": "another"})
    MeasuredHost().calibrate(Cache(tmp_path))
    assert len(asked) == 2
    assert len(first.constants) == 2 * len(FEATURES)
    assert {one.basis for one in first.constants.values()} == {"measured"}


def test_prices_are_the_fitted_seconds(conv: Callable[..., LayerDescription]) -> None:
    rng = np.random.default_rng(0)
    floats, codes = (tuple(rng.uniform(1e-12, 1e-9, len(FEATURES)).tolist()) for _ in range(2))
    model, layer = MeasuredHost(floats, codes), conv(16, 8)
    price = float(np.array(codes) @ layer_features(layer))
    assert model.layer_cost(layer, INT4) == model.layer_cost(layer, INT8) == {"latency": pytest.approx(price)}
    in_float = float(np.array(floats) @ layer_features(layer))
    assert model.layer_cost(layer, FLOAT)["latency"] == pytest.approx(in_float)
    assert model.layer_cost(replace(layer, input_bits=32), INT4)["latency"] == pytest.approx(in_float)
    step = Step("n", "Add", "", 200, 100, 8, ())
    total = model.network_cost([layer], {"conv": INT4}, [step, Step("c", "Conv", "conv", 1, 1, 8, ())])
    expected = codes[0] + price + float(np.array(codes) @ step_features(step))
    assert total == {"latency": pytest.approx(expected)}


def test_the_fingerprint_is_of_this_machine() -> None:
    found = fingerprint()
    assert found == fingerprint()
    assert {"machine", "system", "cores", "onnxruntime"} <= set(found)
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.slow
def test_it_predicts_whole_networks_within_fifteen_percent(examples: Path) -> None:
    """The embedded example, the shape of ResNet-20 and of ResNet-18, in float and in codes."""
    model = MeasuredHost().calibrate(Cache(None))
    block = (Op("conv", 16), Op("conv", 16), Op("add", back=2))
    for one in (
        Benchmark(3, 32, (Op("conv", 16), *block * 3, Op("mean"), Op("gemm", 10))),
        Benchmark(3, 56, (Op("conv", 64), *[replace(op, channels=64) for op in block * 3], Op("mean"), Op("gemm", 10))),
    ):
        for codes in (False, True):
            network = describe(prepare(one.model(codes=False)), 8 if codes else 32)
            specs = {layer.name: INT8 if codes else FLOAT for layer in network.layers}
            predicted = model.network_cost(network.layers, specs, network.steps)["latency"]
            measured_seconds = lowest_times([open_call(one, codes=codes)])[0]
            print(f"{one}: {1e6 * predicted:.1f} us predicted, {1e6 * measured_seconds:.1f} measured")
            assert predicted == pytest.approx(measured_seconds, rel=0.15)
