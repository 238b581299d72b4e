"""What there is to compile for: precisions and cost models with prices, limits, what they take, and every constant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qopt.errors import PluginError
from qopt.hardware.checked import GROUP, CheckedModel, load_model
from qopt.hardware.cost_model import LayerDescription
from qopt.hardware.targets import PROBE, TARGETS
from qopt.plugins import plugins
from qopt.spec import WeightSpec

FORMATS = tuple(
    WeightSpec.parse(text)
    for text in ("int1", "ternary", "int2", "int3", "int4", "log4", "int7", "int8", "int4:block32", "int4:asym")
)
"""What a model is asked whether it takes, on `LAYERS`."""

LAYERS: dict[str, LayerDescription] = {
    "convolution": PROBE,
    "depthwise": replace(PROBE, weight_shape=(64, 1, 3, 3), weights=576, macs=576 * 256, groups=64),
    "matrix product": replace(
        PROBE, op="Gemm", weight_shape=(64, 512), weights=64 * 512, macs=64 * 512, kernel=(), stride=(), inputs=512,
        outputs=64,
    ),
    "convolution in float": replace(PROBE, input_bits=32, output_bits=32),
}  # fmt: skip


def precisions() -> list[dict[str, Any]]:
    """The targets that are no machine: formats, activations and limits as users write them."""
    return [
        {
            "name": target.name, "weights": list(map(str, target.weights)), "activations": str(target.activations),
            "limits": list(map(str, target.limits)),
        }
        for target in TARGETS.values()
    ]  # fmt: skip


def cost_models() -> list[dict[str, Any]]:
    """Every cost model by name; one that does not load or breaks its contract has an ``error`` instead of facts."""
    found = []
    for plugin in plugins(GROUP).values():
        row: dict[str, Any] = {"name": plugin.name, "origin": plugin.origin}
        try:
            row |= _facts(load_model(plugin.name))
        except PluginError as error:
            row["error"] = str(error)
        found.append(row)
    return found


def _facts(model: CheckedModel) -> dict[str, Any]:
    return {
        "prices": dict(model.prices),
        "totals": dict(model.totals),
        "limits": list(map(str, model.limits())),
        "activation_bits": list(model.activation_bits),
        "takes": {name: list(map(str, model.capabilities(layer, FORMATS))) for name, layer in LAYERS.items()},
        "constants": {
            name: {"value": one.value, "unit": one.unit, "basis": one.basis, "source": one.source}
            for name, one in model.constants.items()
        },
    }
