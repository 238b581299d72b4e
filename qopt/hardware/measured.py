"""The cost model of the machine that it runs on: ONNX Runtime on one thread, calibrated by measurement.

`calibrate` times the networks of `microbenchmarks` in float and in 8-bit codes and fits what a call, a multiplication,
an output, a gathered input and a weight cost there; that is kept in the cache under the machine's fingerprint. Weights
of fewer than 8 bits run as int8, which they are unpacked to at load (DESIGN 3.8).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray

from qopt.cache import Cache
from qopt.errors import UsageError
from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step
from qopt.hardware.kernels import fits, on_integers
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.spec import WeightSpec

if TYPE_CHECKING:  # torch comes with it, and a list of targets needs none
    from qopt.hardware.describe import NetworkDescription

FEATURES: Final = (
    "run", "layer", "step", "multiply", "multiply depthwise", "multiply few channels", "multiply matrix", "output",
    "position", "position few channels", "window", "gathered", "weight", "element added", "element pooled",
)  # fmt: skip
"""What a network's time is a sum of: runs, layers, steps without weights, multiply-accumulates by kind of layer, output
elements, output positions, places of windows, inputs that are gathered into windows, weights, elements of steps."""

FEW: Final = 8
"""Input channels of a convolution below which kernels are other ones than those of blocks of 16."""

_SOURCE: Final = "regression on the networks of qopt.hardware.microbenchmarks, CPU time of one thread, on this machine"


@final
@dataclass(frozen=True)
class MeasuredHost:
    """Seconds of one image on this machine.

    Attributes:
        floats: seconds of each of `FEATURES` in float32; empty before calibration.
        codes: the same with 8-bit codes on both sides.
    """

    floats: tuple[float, ...] = ()
    codes: tuple[float, ...] = ()

    name: ClassVar[str] = "measured:host"
    prices: ClassVar[Mapping[str, str]] = units("latency")
    totals: ClassVar[Mapping[str, str]] = units("latency")

    @property
    def constants(self) -> Mapping[str, Constant]:
        """The fitted seconds; none before calibration."""
        kinds = {"float32": self.floats, "int8": self.codes}
        return {
            f"{kind} {feature}": Constant(seconds, "s", "measured", _SOURCE)
            for kind, found in kinds.items()
            for feature, seconds in zip(FEATURES, found, strict=False)
        }

    def calibrate(self, cache: Cache) -> MeasuredHost:
        """The model of this machine; about a minute, then from the cache."""
        found = cache.arrays("measured-host", {"machine": fingerprint(), "features": list(FEATURES)}, measure)
        return MeasuredHost(tuple(found["floats"].tolist()), tuple(found["codes"].tolist()))

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Every format that the layer's shape allows."""
        return tuple(spec for spec in formats if fits(layer, spec))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Seconds of one image in the middle of a network.

        Raises:
            UsageError: before calibration.
        """
        return {"latency": float(self._fitted(on_integers(layer, spec)) @ layer_features(layer))}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """Seconds of one run: the layers, the steps between them, and the call itself."""
        codes = bool(layers) and layers[0].input_bits <= 8
        total = float(self._fitted(codes)[0])
        total += sum(self.layer_cost(layer, specs[layer.name])["latency"] for layer in layers)
        total += sum(float(self._fitted(step.bits <= 8) @ step_features(step)) for step in steps if not step.layer)
        return {"latency": total}

    def limits(self) -> tuple[Limit, ...]:
        """None."""
        return ()

    def _fitted(self, codes: bool) -> NDArray[np.float64]:
        found = self.codes if codes else self.floats
        if not found:
            raise UsageError("the cost model is not calibrated", where=self.name, fix="call calibrate")
        return np.array(found)


def layer_features(layer: LayerDescription) -> NDArray[np.float64]:
    """How much of each of `FEATURES` a layer is, for one image."""
    fan_in = layer.weight_shape[1] if len(layer.weight_shape) > 1 else 1
    kind = "multiply"
    if not layer.kernel:
        kind = "multiply matrix"
    elif layer.groups > 1 and fan_in == 1:
        kind = "multiply depthwise"
    elif fan_in < FEW:
        kind = "multiply few channels"
    positions = layer.outputs // max(layer.channels, 1)
    windows = positions * int(np.prod(layer.kernel)) if max(layer.kernel, default=1) > 1 else 0
    amounts = {
        "layer": layer.uses, kind: layer.macs, "output": layer.outputs, "position": positions, "window": windows,
        "gathered": windows * fan_in * layer.groups, "weight": layer.weights * layer.uses,
        "position few channels": positions if kind == "multiply few channels" else 0,
    }  # fmt: skip
    return np.array([float(amounts.get(feature, 0)) for feature in FEATURES])


def step_features(step: Step) -> NDArray[np.float64]:
    """How much of each of `FEATURES` a step without weights is, for one image."""
    kind = "element added" if step.op in ("Add", "Sub", "Mul", "Div") else "element pooled"
    amounts = {"step": 1, kind: max(step.reads, step.writes)}
    return np.array([float(amounts.get(feature, 0)) for feature in FEATURES])


def measure() -> dict[str, NDArray[np.float64]]:
    """Time every microbenchmark in float and in codes, and fit the seconds of `FEATURES` to each."""
    from qopt.graph.prepare import prepare
    from qopt.hardware.describe import describe
    from qopt.hardware.microbenchmarks import benchmarks, lowest_times, open_call

    networks = benchmarks()
    amounts = [network_features(describe(prepare(one.model(codes=False)), 32)) for one in networks]
    calls = [open_call(one, codes=codes) for codes in (False, True) for one in networks]
    floats, codes = lowest_times(calls).reshape(2, -1)
    return {"floats": fit(np.array(amounts), floats), "codes": fit(np.array(amounts), codes)}


def network_features(network: NetworkDescription) -> NDArray[np.float64]:
    """How much of each of `FEATURES` one run of a network is."""
    found = np.zeros(len(FEATURES))
    found[FEATURES.index("run")] = 1.0
    for layer in network.layers:
        found += layer_features(layer)
    for step in network.steps:
        found += 0.0 if step.layer else step_features(step)
    return found


def fit(amounts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative seconds of each feature (features,) that fit the times (networks,) with least relative error.

    Args:
        amounts: of every network how much of each feature it is, (networks, features).
        seconds: of every network.
    """
    from scipy.optimize import nnls

    scale = amounts.max(axis=0)
    scale[scale == 0] = 1.0
    found: NDArray[np.float64] = nnls(amounts / scale / seconds[:, None], np.ones(len(seconds)))[0] / scale
    return found


def fingerprint() -> dict[str, str]:
    """What a calibration holds for: processor, its instructions, system and the version of ONNX Runtime."""
    found = {
        "machine": platform.machine(), "system": platform.system(), "cores": str(os.cpu_count()),
        "onnxruntime": version("onnxruntime"), "processor": platform.processor(),
    }  # fmt: skip
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    wanted = ("model name", "vendor_id", "cpu family", "model", "stepping", "flags", "cache size", "Features")
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in wanted:
            found.setdefault(key, value)
    return found
