"""How an ONNX node becomes one call of a function on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import fx

from qopt.errors import UnsupportedModelError


@final
@dataclass(frozen=True)
class Call:
    """A function on tensors with its arguments; ``parts`` where it returns a tuple, one tensor per ONNX output."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    parts: bool = False


@final
@dataclass(frozen=True)
class Op:
    """An ONNX node as its handler sees it.

    Attributes:
        node: the node, at opset 21 or newer; its inputs and outputs have the types and shapes that were inferred.
        opset: the opset of the graph.
        lookup: the FX node that holds an ONNX value.
    """

    node: ir.Node
    opset: int
    lookup: Callable[[ir.Value], fx.Node]

    def arg(self, index: int) -> fx.Node:
        """Input ``index``, which must be there."""
        found = self.optional(index)
        if found is None:
            raise self.refuse(f"without its input {index}")
        return found

    def optional(self, index: int) -> fx.Node | None:
        """Input ``index`` or None where it was left out."""
        value = self._value(index)
        return None if value is None else self.lookup(value)

    def args(self) -> tuple[fx.Node, ...]:
        """All inputs of an operator that takes any number."""
        return tuple(self.arg(index) for index in range(len(self.node.inputs)))

    def given(self, index: int) -> bool:
        """Whether input ``index`` is there."""
        return self._value(index) is not None

    def const(self, index: int) -> NDArray[Any] | None:
        """The value of input ``index`` where it is a constant."""
        value = self._value(index)
        known = value is not None and value.is_initializer() and value.const_value is not None
        return value.const_value.numpy() if known and value is not None and value.const_value is not None else None

    def sizes(self, index: int) -> tuple[int, ...] | fx.Node:
        """Input ``index``, a vector of integers: as numbers where it is constant, else the node that computes it."""
        array = self.const(index)
        return self.arg(index) if array is None else tuple(int(entry) for entry in np.atleast_1d(array))

    def number_at(self, index: int) -> float | int | fx.Node | None:
        """Input ``index``, a scalar: a number where it is constant, else the node; None where it was left out."""
        if not self.given(index):
            return None
        array = self.const(index)
        return self.arg(index) if array is None else array.reshape(-1)[0].item()

    def dims(self, index: int) -> tuple[int | None, ...] | None:
        """The shape of input ``index``, None for a size that is not known; None where not even the rank is."""
        value = self._value(index)
        if value is None or value.shape is None:
            return None
        return tuple(dim if isinstance(dim, int) else None for dim in value.shape)

    def type(self, index: int) -> ir.DataType | None:
        """The ONNX type of input ``index`` where it is known."""
        value = self._value(index)
        return None if value is None else value.dtype

    def is_float(self, index: int) -> bool:
        """Whether input ``index`` is known to be of a floating-point type."""
        dtype = self.type(index)
        return dtype is not None and dtype.is_floating_point()

    def is_integer(self, index: int) -> bool:
        """Whether input ``index`` is known to be of an integer type, whatever type the twin carries it in."""
        dtype = self.type(index)
        return dtype is not None and dtype.is_integer()

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_float()

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    def has(self, name: str) -> bool:
        """Whether an attribute is written down."""
        return name in self.node.attributes

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An attribute of integers."""
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tuple(attribute.as_ints())

    def tensor(self, name: str) -> NDArray[Any] | None:
        """A tensor attribute."""
        attribute = self.node.attributes.get(name)
        return None if attribute is None else attribute.as_tensor().numpy()

    def uses_output(self, index: int) -> bool:
        """Whether anything reads output ``index``."""
        outputs = self.node.outputs
        return len(outputs) > index and bool(outputs[index].uses() or outputs[index].is_graph_output())

    def refuse(self, how: str) -> UnsupportedModelError:
        """The error for an operator, or a way to use one, that the twin does not have."""
        return UnsupportedModelError(
            f"operator {self.node.op_type} (opset {self.opset}) {how} is not supported",
            where=f"node {self.node.name!r}",
            fix="the model can still be emitted weight-only, not attacked",
        )

    def _value(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None


Handler = Callable[[Op], Call]

TABLE: Final[dict[str, Handler]] = {}
"""Every operator that the twin has, by its ONNX name; ``domain::name`` where it is none of the standard ones."""


REFUSED: Final = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "control flow"),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), "a recurrent cell"),
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        "random numbers",
    ),
    **dict.fromkeys(
        ("ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
         "SequenceLength", "SplitToSequence", "Optional", "OptionalGetElement", "OptionalHasElement"),
        "a value that is no tensor",
    ),
    **dict.fromkeys(
        ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"), "text"
    ),
}  # fmt: skip
"""Operators that the twin will not have, and what they are; those in neither table nobody has needed so far."""


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Enter a handler into the table under ``names``."""

    def enter(handler: Handler) -> Handler:
        for name in names:
            if name in TABLE:
                raise ValueError(f"operator {name} has two handlers")
            TABLE[name] = handler
        return handler

    return enter
