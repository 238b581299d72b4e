"""Round weights layer after layer, each by GPTQ against the inputs that the quantized layers before it produce."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.errors import DataError, VerificationError
from qopt.passes.base import Result
from qopt.passes.correct_biases import BiasCorrector, ChannelMeans
from qopt.passes.insert_weight_quantizers import WeightQuantizer
from qopt.passes.layer_inputs import InputMoment, has_rows, input_rows
from qopt.passes.nodes import constant_of, is_layer, op_of, weight_chain, weight_source
from qopt.passes.watcher import Watcher
from qopt.quant import AnyWeight
from qopt.quant.gptq import Order, gptq
from qopt.quant.retarget import retargeted

Target = Literal["own", "float"]

POSITIONS = 1 << 15
POSITIONS_PER_COLUMN = 64
"""Inputs that are enough for the moments of a layer: images with thousands of positions need not all be looked at."""


@final
@dataclass(frozen=True, eq=False)
class RoundGPTQ:
    """Sequential GPTQ on the partly quantized network, activation quantizers included.

    Layers whose inputs have no moment (ConvTranspose, rows over `MAX_COLUMNS`) keep their codes, and a note names them.
    A weight with several uses gets one set of codes at its first use, from the inputs of all of them; those of the
    later uses are the float network's, because the quantized ones depend on the codes. The activations of one layer, of
    both networks, are in memory at once.

    Attributes:
        images: float32 (n, ...), as the network takes them; whole batches where the graph takes one batch size only.
        reference: the float graph with the same layers in the same order.
        batch_size: images per run.
        damping, order, scale_search: as `gptq` takes them.
        shrinkage: more damping by this part of columns / positions: a moment of few positions is mostly chance, which
            rounding must not trust (Ledoit and Wolf 2004).
        centred: let the bias absorb the mean: the error that counts is the one around it, and afterwards the mean of
            every output channel of every layer with codes is the float network's over ``images``.
        target: ``own`` keeps what the layer makes of its own inputs; ``float`` what the float network computes, so
            that a layer makes up for the errors of those before it (`retargeted`).
        ridge: as `retargeted` takes it.
        weights: layer name to its new codes, filled by the pass; layers that kept theirs are included.
        biases: (layer, use) to its new bias float32 (channels,), filled by the pass where ``centred``.
    """

    images: Tensor
    reference: GraphModule
    batch_size: int = 64
    damping: float = 0.01
    shrinkage: float = 0.25
    order: Order = "activation"
    scale_search: bool = True
    centred: bool = True
    target: Target = "float"
    ridge: float = 0.3
    weights: dict[str, AnyWeight] = field(default_factory=dict)
    biases: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "round-gptq"
    tolerance: ClassVar[float] = math.inf

    def __call__(self, graph: GraphModule) -> Result:
        """Give every layer with codes new ones, and new biases where ``centred``.

        Raises:
            DataError: inputs or outputs of a layer that are not finite.
            VerificationError: the reference is not the float network of this graph.
        """
        batches = torch.split(self.images, self.batch_size)
        with torch.no_grad():
            rounder = _Rounder(graph, batches, self)
            rounder.run_all()
        rounder.write(self.biases)
        self.weights.update(rounder.codes)
        rounded, kept = len(rounder.codes) - len(rounder.kept), ", ".join(rounder.kept)
        notes = [f"{rounded} weights rounded by GPTQ"] if rounded else []
        notes += [f"rounded to nearest, their inputs have no moment: {kept}"] if kept else []
        return Result(graph, bool(rounder.codes), tuple(notes))


class _Reference(ChannelMeans):
    """The float network, run as far as the quantized one."""

    def __init__(self, graph: GraphModule, batches: tuple[Tensor, ...]) -> None:
        super().__init__(graph, batches)
        self._ahead: Iterator[Node] = iter(graph.graph.nodes)

    def reach(self, layer: str, use: int) -> Node:
        """The call that is this use of the layer, about to run: everything before it has run."""
        for node in self._ahead:
            if is_layer(node) and (node.meta["layer"], node.meta["use"]) == (layer, use):
                return node
            self.step(node)
        raise VerificationError("the float graph does not have this layer here", where=layer, expected=f"use {use}")


class _LaterUses(Watcher):
    """Moments of the float inputs of every use of a layer but the first."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, dict[int, InputMoment]] = {}

    def run_node(self, n: Node) -> object:
        if is_layer(n) and n.meta["use"] > 0:
            args, _ = self.fetch_args_kwargs_from_env(n)
            if has_rows(n, args):
                moment = self.found.setdefault(n.meta["layer"], {}).setdefault(n.meta["use"], InputMoment())
                for rows in input_rows(n, args):
                    moment.add(rows)
        return super().run_node(n)


class _Rounder(BiasCorrector):
    def __init__(self, graph: GraphModule, batches: tuple[Tensor, ...], options: RoundGPTQ) -> None:
        self._reference = _Reference(options.reference, batches)
        super().__init__(graph, batches, self._reference.means)
        self._options = options
        self._later = _later_uses(graph, options)
        self.codes: dict[str, AnyWeight] = {}
        self.kept: list[str] = []

    def before(self, node: Node) -> None:
        """Round the weight at its first use; run the float network up to and including the same call."""
        layer, use = node.meta["layer"], node.meta["use"]
        call = self._reference.reach(layer, use)
        source = weight_source(node)
        if source.op == "call_module":
            if layer not in self.codes:
                self._round(node, call, source)
            self.refresh(weight_chain(node))
        self._reference.step(call)

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs, under the new bias where the options ask for one."""
        return super().layer(node, outputs) if self._options.centred else outputs

    def _round(self, node: Node, call: Node, source: Node) -> None:
        layer: str = node.meta["layer"]
        module = self.fetch_attr(str(source.target))
        assert isinstance(module, WeightQuantizer)
        moments = self._moments(node, call)
        if moments is None:
            self.kept.append(layer)
        else:
            weight = constant_of(self._options.reference, weight_source(call))
            module.weight = _codes(weight, module.weight, moments, self._options, layer)
        self.codes[layer] = module.weight

    def _moments(self, node: Node, call: Node) -> _Moments | None:
        """What the calibration images say of the layer's inputs; None where it has no rows."""
        own, cross = InputMoment(), InputMoment()
        pairs_of_batches = list(zip(self.environments, self._reference.environments, strict=True))
        args = self.arguments(node, self.environments[0])
        if not has_rows(node, args):
            return None
        stride = _stride(node, args, len(pairs_of_batches))
        for environment, floats in pairs_of_batches[::stride]:
            args = self.arguments(node, environment)
            if self._options.target == "own":
                for rows in input_rows(node, args):
                    own.add(rows)
                continue
            pairs = zip(input_rows(node, args), input_rows(call, self._reference.arguments(call, floats)), strict=True)
            for rows, wanted in pairs:
                own.add(rows)
                cross.add(rows, wanted)
        later = list(self._later.get(node.meta["layer"], {}).values())
        counts = [own.count * stride, *(moment.count for moment in later)]
        found = _average([own, *later], counts, self._options.centred)
        seen = own.count + sum(moment.count for moment in later)
        if self._options.target == "own":
            return _Moments(found, None, seen)
        return _Moments(found, _average([cross, *later], counts, self._options.centred), seen)


@final
@dataclass(frozen=True, eq=False)
class _Moments:
    own: Tensor  # (groups, columns, columns), of the layer's inputs
    cross: Tensor | None  # the one with the float network's inputs, where that is the target
    positions: int


def _stride(node: Node, args: Sequence[Any], batches: int) -> int:
    """Every how many batches are enough for `POSITIONS` inputs."""
    x, weight = args[:2]
    if op_of(node) == "Conv":
        positions = x[:, 0].numel() // math.prod(args[3])  # the padding counts as the border that it covers
        columns = weight[0].numel()
    else:
        positions, columns = x.numel() // x.shape[-1], x.shape[-1]
    needed = max(POSITIONS, POSITIONS_PER_COLUMN * columns)
    return max(1, int(batches * positions // needed))


def _later_uses(graph: GraphModule, options: RoundGPTQ) -> Mapping[str, Mapping[int, InputMoment]]:
    if not any(is_layer(node) and node.meta["use"] > 0 for node in graph.graph.nodes):
        return {}
    watcher = _LaterUses(options.reference)
    watcher.watch(options.images, options.batch_size)
    return watcher.found


def _average(moments: Sequence[InputMoment], counts: Sequence[int], centred: bool) -> Tensor:
    """Over the positions that all uses have, each around its own mean where it has a bias to absorb that."""
    first, *others = ((m.covariance if centred else m.moment) for m in moments)
    if not others:
        return first  # a copy more would be 170 MB for the longest rows
    parts = zip([first, *others], counts, strict=True)
    return torch.stack([part * count / sum(counts) for part, count in parts]).sum(0)


def _codes(weight: Tensor, like: AnyWeight, moments: _Moments, options: RoundGPTQ, layer: str) -> AnyWeight:
    own, cross = moments.own, moments.cross
    if not all(bool(m.isfinite().all()) for m in (own, cross) if m is not None):
        raise DataError("inputs that are not finite", where=layer, fix="check the model and its data")
    target = weight if cross is None else retargeted(weight, like.axis, own, cross, ridge=options.ridge)
    damping = options.damping + options.shrinkage * own.shape[-1] / moments.positions
    return gptq(target, like, own, damping=damping, order=options.order, scale_search=options.scale_search)
