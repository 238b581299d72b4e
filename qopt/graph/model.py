"""The prepared graph and its layers: what every later step works from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.errors import UsageError, nearest

NOTES: Final = "qopt.notes"
"""The key in a loaded model's ``meta`` under which a list of notes for the report travels to `prepare`."""

WeightedOp = Literal["Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"]

Feeds = Mapping[str, NDArray[Any]]
"""One run's inputs by name."""


@final
@dataclass(frozen=True)
class GraphInput:
    """One input of a network.

    Attributes:
        name: the ONNX value's name.
        dtype: its ONNX type, such as ``FLOAT`` or ``INT64``.
        shape: its sizes, None where an axis is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        """``input_ids INT64 (?, 128)``."""
        return f"{self.name} {self.dtype} ({', '.join('?' if size is None else str(size) for size in self.shape)})"


@final
@dataclass(frozen=True)
class Use:
    """One node that applies a layer's weight.

    Attributes:
        node: the ONNX node's name.
        input: name of the value that carries the activations.
        output: name of the node's output value; for a MatMul followed by its bias Add, the Add's output.
        bias: name of the initializer that is added, of shape (output channels,), or None.
        macs: multiply-accumulates for one image, or for one item of the first input's first axis in
            `Prepared.example`; none for Gather.
    """

    node: str
    input: str
    output: str
    bias: str | None
    macs: int


@final
@dataclass(frozen=True)
class Layer:
    """One weight tensor with the operators that use it; the unit that gets a format.

    Attributes:
        name: the layer's name in plan, report and emitted file: its weight's qualified name.
        op: the ONNX operator of its uses; Gather for an embedding, also where a matrix product ties in.
        initializer: name of the weight's initializer in the prepared graph (usually equal to ``name``).
        shape: shape of the weight as stored.
        channel_axis: the axis of ``shape`` that counts output channels.
        groups: convolution groups (1 elsewhere).
        uses: every node that applies the weight, in graph order; at least one.
    """

    name: str
    op: WeightedOp
    initializer: str
    shape: tuple[int, ...]
    channel_axis: int
    groups: int
    uses: tuple[Use, ...]

    @property
    def channels(self) -> int:
        """Output channels, the number of scales of a per-channel format."""
        return self.shape[self.channel_axis]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image or item, over all uses."""
        return sum(use.macs for use in self.uses)


@final
@dataclass(frozen=True)
class Prepared:
    """A float network ready to be quantized.

    A classifier of images takes one float image and gives one row of logits; of any other network the weights alone
    can be quantized, and nothing is attacked.

    Attributes:
        model: the ONNX graph, cleaned: batch norm folded, constants folded, names unique, opset 21 or newer.
        inputs: what the graph takes, in order.
        other: why the network is no classifier of images, one clause; empty for one that is.
        input: name of the image input; ``output``: name of the logits. Elsewhere the first of each.
        input_shape: shape of one image, without the batch axis; empty for another network.
        classes: number of logits; 0 for another network.
        batch: None where the batch axis is dynamic or nobody knows it, else the only batch size that the graph takes.
        layers: what can be quantized, in graph order.
        notes: what was done to the user's graph, one clause each, for the report.
        digest: SHA-256 of the graph's content; equal for equal networks whatever file they came from.
        example: inputs that the graph takes, drawn at random.
    """

    model: ir.Model
    inputs: tuple[GraphInput, ...]
    other: str
    input: str
    output: str
    input_shape: tuple[int, ...]
    classes: int
    batch: int | None
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]
    digest: str
    example: Feeds = field(compare=False, repr=False)

    @property
    def image(self) -> bool:
        """Whether it classifies images: one float image in, one row of logits out."""
        return not self.other

    @property
    def macs(self) -> int:
        """Multiplications of all layers for one image."""
        return sum(layer.macs for layer in self.layers)

    def layer(self, name: str) -> Layer:
        """The layer called ``name``; raises UsageError that offers the nearest names."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UsageError("no such layer", where=name, fix=nearest(name, [layer.name for layer in self.layers]))

    def initializer(self, name: str) -> np.ndarray:
        """The value of an initializer."""
        value = self.model.graph.initializers[name].const_value
        assert value is not None
        return value.numpy()
