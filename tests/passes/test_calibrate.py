"""Ranges are those of the activations that ONNX Runtime computes for the same images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qopt.errors import DataError
from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.annotate import Annotate, quantizable
from qopt.passes.base import Pipeline
from qopt.passes.calibrate import Calibrate
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.quant import AffineRange, RangeObserver, calibrated_bounds
from qopt.spec import ActivationSpec

Values = Callable[..., dict[str, NDArray[np.float32]]]
Images = Callable[..., torch.Tensor]
SPECS = {"r1": "int8:p99", "c2": "int4:p99", "r2": "int8"}
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]


def _marked(prepared: Prepared) -> Any:
    twin = build_twin(prepared)
    CanonicaliseLinear()(twin)
    Annotate()(twin)
    return twin


def _oracle(prepared: Prepared, tensors: list[str], images: torch.Tensor, values: Values) -> dict[str, NDArray[Any]]:
    size = prepared.batch or len(images)
    parts = [values(prepared.model, tensors, chunk) for chunk in torch.split(images, size)]
    return {name: np.concatenate([part[name].ravel() for part in parts]) for name in tensors}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_minimum_and_maximum_are_exact(
    name: str, batch_size: int, networks: dict[str, Prepared], images: Images, onnx_values: Values
) -> None:
    prepared = networks[name]
    sample, twin = images(prepared, 10), _marked(prepared)
    calibrate = Calibrate(sample, prepared.batch or batch_size)
    assert not calibrate(twin).modified
    tensors = list(quantizable(twin))
    assert list(calibrate.observers) == tensors
    for tensor, values in _oracle(prepared, tensors, sample, onnx_values).items():
        low, high = calibrate.bounds({tensor: ActivationSpec(8)})[tensor]
        assert (low, high) == pytest.approx((float(values.min()), float(values.max())), abs=1e-5)
        assert calibrate.observers[tensor].count == values.size


@pytest.mark.parametrize("percentile", [99.9, 99.0, 90.0, 60.0])
@pytest.mark.parametrize("name", ["plain", "residual", "mlp", "static"])
def test_percentiles_are_those_of_numpy(
    name: str, percentile: float, networks: dict[str, Prepared], images: Images, onnx_values: Values
) -> None:
    prepared = networks[name]
    sample, twin = images(prepared, 12), _marked(prepared)
    calibrate = Calibrate(sample, prepared.batch or 5)
    calibrate(twin)
    tensors = list(quantizable(twin))
    found = calibrate.bounds(dict.fromkeys(tensors, ActivationSpec(8, percentile)))
    for tensor, values in _oracle(prepared, tensors, sample, onnx_values).items():
        bins = [calibrate.observers[tensor].bin_width] * 2
        expected = np.percentile(values.astype(np.float64), [100 - percentile, percentile])
        assert np.all(np.abs(np.array(found[tensor]) - expected) <= bins), tensor


def test_the_batch_size_does_not_matter(networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["residual"], 9)
    found = []
    for size in (1, 4, 9, 100):
        calibrate = Calibrate(sample, size)
        calibrate(_marked(networks["residual"]))
        found.append(calibrate.bounds({name: ActivationSpec.parse(spec) for name, spec in SPECS.items()}))
    for other in found[1:]:
        for name, bounds in other.items():
            assert bounds == pytest.approx(found[0][name], abs=1e-5)


def test_only_tensors_with_a_range_of_their_own_are_observed(networks: dict[str, Prepared], images: Images) -> None:
    twin = _marked(networks["pool"])
    calibrate = Calibrate(images(networks["pool"], 4))
    pipeline = Pipeline((calibrate,), images(networks["pool"], 2))
    pipeline(twin)
    assert set(calibrate.observers) == {"x", "c1", "r1", "r2", "p2"}  # not p1 and f, which are views
    assert pipeline.notes == ["ranges observed on 4 images"]


def test_a_second_run_adds_to_the_first(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    twin, sample = _marked(prepared), images(prepared, 8)
    whole, first = Calibrate(sample), Calibrate(sample[:3])
    whole(twin)
    first(twin)
    Calibrate(sample[3:], observers=first.observers)(twin)
    names = dict.fromkeys(whole.observers, ActivationSpec(8, 95.0))
    assert first.bounds(names) == whole.bounds(names)


def test_an_activation_that_is_not_finite_is_named_in_one_line(network: Callable[[str], Prepared]) -> None:
    prepared = network(
        """(float[n,2,4,4] x, float[2,2,1,1] w) => (float[n,32] y) {
            d = Log (x)
            c = Conv (d, w)
            y = Flatten (c)
        }"""
    )
    twin = _marked(prepared)
    with pytest.raises(DataError, match=r"^d: activations that are NaN or infinite") as caught:
        Calibrate(torch.zeros(1, 2, 4, 4))(twin)
    assert "\n" not in str(caught.value)
    assert "\n" not in str(caught.value.args[0])


@pytest.mark.parametrize("spec", ["int8:mse", "int4:mse", "int2:mse", "int4:entropy", "int4:clip6", "int1"])
@pytest.mark.parametrize("name", ["plain", "residual", "mlp"])
def test_every_calibrator_sees_what_onnx_runtime_computes(
    name: str, spec: str, networks: dict[str, Prepared], images: Images, onnx_values: Values
) -> None:
    prepared = networks[name]
    sample, twin = images(prepared, 12), _marked(prepared)
    calibrate = Calibrate(sample, 5)
    calibrate(twin)
    tensors = list(quantizable(twin))
    found = calibrate.bounds(dict.fromkeys(tensors, ActivationSpec.parse(spec)))
    for tensor, values in _oracle(prepared, tensors, sample, onnx_values).items():
        observer = RangeObserver(tensor)
        observer.update(torch.from_numpy(values))
        expected = calibrated_bounds(observer, ActivationSpec.parse(spec))
        assert found[tensor] == pytest.approx(expected, abs=max(1e-5, 2 * observer.bin_width)), tensor


@pytest.mark.parametrize("calibrator", ["minmax", "p99", "mse", "entropy"])
def test_what_a_relu6_has_clipped_gets_no_codes_beyond(calibrator: str, network: Callable[[str], Prepared]) -> None:
    prepared = network(
        """(float[n,2,4,4] x, float[3,2,1,1] w, float[3,3,1,1] v) => (float[n,48] y)
        <float low = {0}, float high = {6}> {
            c = Conv (x, w)
            r = Clip (c, low, high)
            d = Conv (r, v)
            y = Flatten (d)
        }"""
    )
    twin = _marked(prepared)
    calibrate = Calibrate(10 * torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    calibrate(twin)
    assert calibrate.observers["r"].bounds() == (0.0, 6.0)
    low, high = calibrate.bounds({"r": ActivationSpec.parse(f"int4:{calibrator}")})["r"]
    assert 0.0 <= low <= calibrate.observers["r"].bin_width
    assert 1.0 < high <= 6.0
    assert AffineRange.from_bounds(low, high, 4).zero_point == 0
