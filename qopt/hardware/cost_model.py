"""The contract of a cost model, the plugin group `qopt.cost_models`.

A model prices formats for one machine and the runtime that executes them there: what really runs, so 4-bit weights are
no faster where they are unpacked to 8 bits first. `qopt.testing.cost_model_contract` checks a model against all that is
said here, and `qopt.hardware.checked` holds plugins to it in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal, Protocol, final

from qopt.limits import Limit
from qopt.spec import WeightSpec

Basis = Literal["measured", "published", "assumed"]
"""Where a number comes from: measured by us, published by somebody, or our own guess."""

FLOAT_BITS: Final = 32
WIDEST: Final = 8
"""Bits of the widest activation code."""

CONTAINER: Final = 8
"""Bits of memory that an activation code of 1 to 8 bits takes, in ONNX Runtime and in the emitted C alike."""


@final
@dataclass(frozen=True)
class Constant:
    """A number that a model computes with, and why one should believe it."""

    value: float
    unit: str
    basis: Basis
    source: str


@final
@dataclass(frozen=True)
class LayerDescription:
    """What a cost model may know of a layer.

    Attributes:
        name: the layer's name in plan and report.
        op: ``Conv``, ``ConvTranspose``, ``Gather``, ``Gemm`` or ``MatMul``.
        weight_shape: as stored in ONNX.
        channels: output channels.
        weights: number of weights.
        macs: multiply-accumulates for one image, over all uses of the weight.
        kernel: sizes of a convolution's window; empty elsewhere.
        stride: of a convolution; empty elsewhere.
        groups: of a convolution, 1 elsewhere.
        inputs: elements that are read for one image, over all uses; ``outputs``: that are written.
        input_bits: of the activations that are read, 1 to 8, or 32 for float; ``output_bits``: that are written.
        uses: how many nodes apply the weight.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    channels: int
    weights: int
    macs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    inputs: int = 0
    outputs: int = 0
    input_bits: int = FLOAT_BITS
    output_bits: int = FLOAT_BITS
    uses: int = 1

    @property
    def taps(self) -> int:
        """Weights of one output channel."""
        return self.weights // max(self.channels, 1)

    @property
    def positions(self) -> int:
        """How often each weight is multiplied for one image."""
        return self.macs // max(self.weights, 1)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations that are read and written for one image."""
        return ceil((self.inputs * container(self.input_bits) + self.outputs * container(self.output_bits)) / 8)


@final
@dataclass(frozen=True)
class Live:
    """One activation tensor in memory: its name, its elements for one image, and the bits of each (32 for float)."""

    name: str
    elements: int
    bits: int = FLOAT_BITS

    @property
    def bytes(self) -> int:
        """Bytes of memory: codes of up to 8 bits take one each."""
        return ceil(self.elements * container(self.bits) / 8)


@final
@dataclass(frozen=True)
class Step:
    """One step of a network's execution: a node of the graph with what the runtime fuses into it.

    Attributes:
        name: the node's name.
        op: its ONNX operator.
        layer: the layer whose weight it applies; empty for one without.
        reads: elements that are read for one image; ``writes``: that are written.
        bits: of them, 32 for float.
        live: what is in memory while it runs, its inputs and output included: the row of a solver that has a limit on
            memory, ``sum(elements * bits) <= limit``.
    """

    name: str
    op: str
    layer: str
    reads: int
    writes: int
    bits: int
    live: tuple[Live, ...]

    @property
    def bytes(self) -> int:
        """Bytes in memory while it runs."""
        return sum(tensor.bytes for tensor in self.live)

    @property
    def moved_bytes(self) -> int:
        """Bytes that are read and written."""
        return ceil((self.reads + self.writes) * container(self.bits) / 8)


@final
@dataclass(frozen=True)
class StepMemory:
    """What must be in memory at once at one step: a row of the solver, ``base + sum(weight_memory) <= limit``.

    Attributes:
        place: the step's name.
        base: bytes whatever the formats are: the live activations.
        layers: those whose weights are in the same memory at this step.
    """

    place: str
    base: float
    layers: tuple[str, ...] = ()


Specs = Mapping[str, WeightSpec]
"""A plan's formats by layer."""


class CostModel(Protocol):
    """Prices formats. Additive prices go to the solver; `network_cost` has the last word on a whole plan.

    Implementations are built without arguments, compare and hash by what they are and can be pickled: frozen
    dataclasses. All methods are pure: the same arguments give the same answer. A model may have these besides:

    - ``activation_bits: tuple[int, ...]``: the widths of activation codes that it prices differently, of 1 to 8 bits,
      widest first; 8 alone where it says nothing. A search may give a tensor any of them, and a layer that reads it is
      priced with that `LayerDescription.input_bits`: fewer bits never cost more.
    - ``calibrate(cache: qopt.cache.Cache) -> CostModel``: the same model with constants measured on this machine.
    - ``weight_memory(layer, spec) -> float`` and ``step_memory(layers, steps) -> Sequence[StepMemory]``, both or
      neither, where weights share the memory that limits on ``sram`` bound, on-chip memory that they are loaded to:
      bytes of one layer's weights while they are there, and when that is. Then ``network_cost`` gives ``sram`` as the
      most of all steps, and the solver keeps the limit at every one.
    """

    @property
    def name(self) -> str:
        """The word for it behind ``--target``, and its entry point's name."""
        ...

    @property
    def prices(self) -> Mapping[str, str]:
        """What `layer_cost` gives: quantities of `qopt.hardware.quantities.ADDITIVE` to their units."""
        ...

    @property
    def totals(self) -> Mapping[str, str]:
        """What `network_cost` gives: quantities of `qopt.hardware.quantities.WHOLE` to their units."""
        ...

    @property
    def constants(self) -> Mapping[str, Constant]:
        """What it computes with, by name."""
        ...

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Those of ``formats``, in their order, that the hardware and its runtime can take for the layer."""
        ...

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Additive costs of the layer in the format: every quantity of `prices`, finite and not negative."""
        ...

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """Costs of a whole plan: every quantity of `totals`, finite and not negative.

        Of additive ones the sum over layers, with what ``steps`` without a layer and the program itself take; that rest
        must not depend on ``specs``.
        """
        ...

    def limits(self) -> tuple[Limit, ...]:
        """Limits of the hardware that every plan must keep."""
        ...


def container(bits: int) -> int:
    """Bits of memory that an activation of ``bits`` bits takes."""
    return CONTAINER if bits <= CONTAINER else bits


def summed(model: CostModel, layers: Sequence[LayerDescription], specs: Specs) -> dict[str, float]:
    """`layer_cost` summed over the layers: every quantity of `prices`."""
    found = dict.fromkeys(model.prices, 0.0)
    for layer in layers:
        for quantity, cost in model.layer_cost(layer, specs[layer.name]).items():
            found[quantity] += cost
    return found


def peak(steps: Sequence[Step]) -> Step | None:
    """The step with the most bytes in memory, the first among equals; None without steps."""
    return max(steps, key=lambda step: step.bytes, default=None)
