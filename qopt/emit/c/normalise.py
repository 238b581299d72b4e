"""The normalisation in front of a network, which is done on float numbers while they become codes."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from qopt.emit.c.steps import Normalise
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized

_SIGNS: Final = {"Sub": "-", "Add": "+", "Mul": "*", "Div": "/"}


def find_input(prepared: Prepared, quantized: Quantized) -> tuple[ir.Value, tuple[Normalise, ...]]:
    """The first quantized value behind the image, and the operators by constants of each channel that lead to it.

    Without such a value the image itself and none.
    """
    image = value = next(v for v in prepared.model.graph.inputs if v.name == prepared.input)
    found: list[Normalise] = []
    while str(value.name) not in quantized.activations:
        users = list(value.uses())
        step = _normalise(users[0].node, users[0].idx, prepared.input_shape) if len(users) == 1 else None
        if step is None:
            return image, ()
        found.append(step)
        value = users[0].node.outputs[0]
    return value, tuple(found)


def _normalise(node: ir.Node, position: int, shape: tuple[int, ...]) -> Normalise | None:
    sign, other = _SIGNS.get(node.op_type), node.inputs[1 - position] if len(node.inputs) == 2 else None
    if sign is None or other is None or other.const_value is None or (position and sign in "-/"):
        return None
    numbers = other.const_value.numpy()
    if numbers.ndim > len(shape) + 1 or numbers.dtype != np.float32:
        return None
    by_channel = np.broadcast_to(numbers, (1, *shape)).reshape(shape[0], -1)
    if (by_channel != by_channel[:, :1]).any():
        return None
    return Normalise(sign, tuple(float(number) for number in by_channel[:, 0]))
