"""A twin as steps on one image that bounds can walk through: affine maps, sums, monotone curves, maxima."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from qopt.certificates.curves import Curve
from qopt.certificates.maps import Map, Shape
from qopt.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Step:
    """One value that the network computes.

    Attributes:
        name: the name of the twin's node that it belongs to.
        op: the ONNX operator, for messages.
        inputs: the steps that it reads, by their place in `Network.steps`.
        shape: of one image, without the batch axis.
    """

    name: str
    op: str
    inputs: tuple[int, ...]
    shape: Shape


@final
@dataclass(frozen=True, eq=False)
class Entry(Step):
    """The image."""


@final
@dataclass(frozen=True, eq=False)
class Affine(Step):
    """``W x + b``."""

    map: Map


@final
@dataclass(frozen=True, eq=False)
class Sum(Step):
    """The inputs, all of this step's shape, added with the ``signs`` +1 and -1."""

    signs: tuple[int, ...]


@final
@dataclass(frozen=True, eq=False)
class Concat(Step):
    """The inputs one after another along ``axis``, which counts without the batch axis."""

    axis: int


@final
@dataclass(frozen=True, eq=False)
class Bend(Step):
    """A monotone function, element by element."""

    curve: Curve


@final
@dataclass(frozen=True, eq=False)
class Maximum(Step):
    """The largest element of every window.

    ``windows`` int64 (outputs, window): places in the flattened source; -1 for padding, which never is the largest.
    """

    windows: Tensor


@final
@dataclass(frozen=True, eq=False)
class Opaque(Step):
    """An operator that bounds per image do not pass; ``node`` is for the calculus, which knows some of them."""

    node: Node

    def refuse(self, what: str) -> UnsupportedModelError:
        """The error for an analysis that ends here."""
        return UnsupportedModelError(
            f"operator {self.op} is not supported by {what}", where=f"node {self.name!r}",
            fix="attacks and the norms of its layers still work",
        )  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class Network:
    """Steps in an order in which each follows what it reads; the first is the image, the last the output (classes,)."""

    steps: tuple[Step, ...]

    @property
    def image_shape(self) -> Shape:
        """Of one image."""
        return self.steps[0].shape

    @property
    def classes(self) -> int:
        """How many numbers come out."""
        return self.steps[-1].shape[0]

    def readers(self) -> list[int]:
        """How many inputs of later steps each step is."""
        counts = [0] * len(self.steps)
        for step in self.steps:
            for source in step.inputs:
                counts[source] += 1
        return counts


def difference(first: Network, second: Network) -> Network:
    """The network that computes ``first(x) - second(x)``, whatever the two have in common.

    Raises:
        UnsupportedModelError: they do not take the same images or do not give as many numbers.
    """
    if first.image_shape != second.image_shape or first.steps[-1].shape != second.steps[-1].shape:
        raise UnsupportedModelError(
            "two networks that cannot be compared", where="their difference",
            expected=f"{first.image_shape} to {first.steps[-1].shape}",
            got=f"{second.image_shape} to {second.steps[-1].shape}",
        )  # fmt: skip
    count = len(first.steps)
    moved = [_moved(step, count - 1) for step in second.steps[1:]]
    ends = (count - 1, count - 2 + len(second.steps))
    last = Sum("difference", "Sub", ends, first.steps[-1].shape, (1, -1))
    return Network((*first.steps, *moved, last))


def _moved(step: Step, by: int) -> Step:
    """``step`` with what it reads ``by`` places later; the image stays."""
    fields = {name: getattr(step, name) for name in step.__dataclass_fields__}
    fields["inputs"] = tuple(source + by if source else 0 for source in step.inputs)
    return type(step)(**fields)
