"""Reads a twin node by node into the steps of `qopt.certificates.network`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qopt.certificates.maps import Map, picked
from qopt.certificates.network import Affine, Entry, Network, Opaque, Step
from qopt.errors import CorruptModelError, UnsupportedModelError
from qopt.graph.operators.shape import shape_of, size_of

Handler = Callable[["Reader", Node], int]


class _Values(Interpreter):
    def __init__(self, twin: GraphModule) -> None:
        super().__init__(twin)
        self.values: dict[Node, Any] = {}
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


@final
@dataclass
class Reader:
    """Reads nodes in order.

    Attributes:
        twin: what is read.
        image_shape: of one image.
        handler_of: how to read a node; None where no rule is known.
        values: what every node computes for one image of zeros: the constants, and every shape.
        steps: what has been read.
        places: the step that holds a node's value; nodes that depend on no pixel have none.
    """

    twin: GraphModule
    image_shape: tuple[int, ...]
    handler_of: Callable[[Reader, Node], Handler | None]
    values: dict[Node, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    places: dict[Node, int] = field(default_factory=dict)

    def read(self) -> Network:
        """Read all of it."""
        self.values = self._run()
        for node in self.twin.graph.nodes:
            if node.op == "placeholder":
                if self.steps:
                    raise UnsupportedModelError("a network of several inputs", where=f"input {node.name!r}")
                self.places[node] = self._append(Entry(node.name, "the image", (), self.image_shape))
            elif node.op == "output":
                return self._finished(node)
            elif self._varies(node):
                place = self._step(node)
                if place is not None:
                    self.places[node] = place
            elif isinstance(value := self.values[node], Tensor) and not bool(torch.isfinite(value).all()):
                raise CorruptModelError("a constant that is not finite", where=str(node.target))
        raise UnsupportedModelError("a graph without an output", where="the twin")

    def _run(self) -> dict[Node, Any]:
        runner = _Values(self.twin)
        try:
            with torch.no_grad():
                runner.run(torch.zeros(1, *self.image_shape))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UnsupportedModelError(
                "the network does not run on one image", where="certificates", got=reason,
                fix="export it with a dynamic batch axis",
            ) from error  # fmt: skip
        return runner.values

    def _varies(self, node: Node) -> bool:
        """Whether the value depends on the pixels, not only on the image's shape."""
        return node.target not in (shape_of, size_of) and any(n in self.places for n in node.all_input_nodes)

    def _step(self, node: Node) -> int | None:
        handler = self.handler_of(self, node)
        if handler is not None:
            return handler(self, node)
        if node.target is operator.getitem:
            return self._part(node)
        if isinstance(self.values[node], tuple):
            return self._parts(node)
        return self.opaque(node)

    def _finished(self, node: Node) -> Network:
        last = node.args[0]
        if not isinstance(last, Node) or last not in self.places or len(self.shape(last)) != 1:
            raise UnsupportedModelError("a network that does not map an image to one row of numbers", where="output")
        place = self.places[last]
        if place != len(self.steps) - 1:  # what follows the output is read by nobody
            self.steps = self.steps[: place + 1]
        return Network(tuple(self.steps))

    def shape(self, node: Node) -> tuple[int, ...]:
        """Of one image, without the batch axis."""
        size = tuple(self.values[node].shape)
        if not size or size[0] != 1:
            raise self.refuse(node, "moves the batch axis, which")
        return size[1:]

    def constant(self, argument: Any) -> Tensor | None:
        """An argument that no pixel changes, as a float64 tensor; None for a node that one does."""
        if isinstance(argument, Node):
            value = self.values[argument]
            return value.detach().double() if isinstance(value, Tensor) and argument not in self.places else None
        return torch.tensor(float(argument), dtype=torch.float64) if isinstance(argument, (int, float)) else None

    def per_image(self, node: Node, constant: Tensor) -> Tensor:
        """A constant without the batch axis, for use beside one image of ``node``'s shape."""
        while constant.ndim > len(self.shape(node)):
            if constant.shape[0] != 1:
                raise self.refuse(node, "with another constant for every image")
            constant = constant[0]
        return constant

    def add(self, kind: Callable[..., Step], node: Node, inputs: tuple[int, ...], *rest: Any) -> int:
        """Append a step of the node's shape; returns its place."""
        return self._append(kind(node.name, self.op(node), inputs, self.shape(node), *rest))

    def affine(self, node: Node, source: int, map_: Map, shape: tuple[int, ...] | None = None) -> int:
        """Append an affine step of the node's shape, or of ``shape``."""
        return self._append(
            Affine(node.name, self.op(node), (source,), self.shape(node) if shape is None else shape, map_)
        )

    def expanded(self, node: Node, source: int, shape: tuple[int, ...]) -> int:
        """The step ``source`` broadcast to ``shape``; itself where it has it."""
        if self.steps[source].shape == shape:
            return source
        pick = picked(lambda x: x.reshape(1, *[1] * (len(shape) + 1 - x.ndim), *x.shape[1:]).expand(1, *shape),
                      self.steps[source].shape)  # fmt: skip
        return self.affine(node, source, pick, shape)

    def moved(self, node: Node, argument: Node, function: Callable[[Tensor], Tensor]) -> int:
        """Append what ``function``, which only moves elements of the image, does to ``argument``."""
        source = self.places[argument]
        try:
            found = picked(function, self.steps[source].shape)
        except ValueError as error:
            raise self.refuse(node, "moves the batch axis, which") from error
        return self.affine(node, source, found, tuple(found.index.shape))

    def opaque(self, node: Node) -> int:
        """Append a step that ends the bounds per image."""
        sources = tuple(self.places[n] for n in node.all_input_nodes if n in self.places)
        return self._append(Opaque(node.name, self.op(node), sources, self.shape(node), node))

    def op(self, node: Node) -> str:
        """The ONNX operator, or the name of the function or module."""
        target = node.target
        return str(node.meta.get("op") or getattr(target, "__name__", target))

    def refuse(self, node: Node, how: str) -> UnsupportedModelError:
        """The error for a node."""
        return UnsupportedModelError(
            f"operator {self.op(node)} {how} is not supported by certificates", where=f"node {node.name!r}"
        )

    def call(self, node: Node, value: Tensor) -> Any:
        """What the node's function makes of one image ``value`` in place of its first argument."""

        def known(argument: Any) -> Any:
            return self.values[argument] if isinstance(argument, Node) else argument

        rest = tuple(known(argument) for argument in node.args[1:])
        assert callable(node.target)
        return node.target(value, *rest, **{key: known(value) for key, value in node.kwargs.items()})

    def _parts(self, node: Node) -> int | None:
        """A node of several outputs: nothing yet, its parts are read one by one."""
        if self.op(node) not in ("Split", "Dropout"):
            raise self.refuse(node, "of several outputs")
        source = node.args[0]
        assert isinstance(source, Node)
        self.places[node] = self.places[source]  # never read as a value, only by `_part`
        return None

    def _part(self, node: Node) -> int:
        source, index = node.args
        assert isinstance(source, Node)
        assert isinstance(index, int)
        argument = source.args[0]
        assert isinstance(argument, Node)
        return self.moved(node, argument, lambda x: self.call(source, x)[index])

    def _append(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1
