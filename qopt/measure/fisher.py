"""What a change of weights does to a network's predictions, to second order, each output channel by itself.

A small change of the weights moves the predictions by ``KL = 1/2 E (g . dy)^2 + ...`` nats, dy what it changes in the
outputs of the layers and g the gradient of ``log p_c``, c drawn from the prediction p: the Fisher information (Martens
2020, "New insights and perspectives on the natural gradient method", section 5). One backward pass gives an unbiased
estimate for all layers at once, with the gradient of ``sum_c r_c sqrt(p_c) log p_c`` for signs r drawn at random. What
one channel of one layer adds is a sum over its positions, so that errors which cancel there cancel here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from qopt.passes.layer_inputs import has_rows, input_rows
from qopt.passes.nodes import is_layer, op_of
from qopt.passes.watcher import Watcher
from qopt.quant.gptq import as_rows

WEIGHT_GRADIENTS = 1 << 25
"""Entries of the weight gradients of single images that are held at a time: 128 MB."""


@final
@dataclass(frozen=True, eq=False)
class Change:
    """Changes of one layer's weight that are to be compared.

    Attributes:
        axis: the axis of the weight that counts output channels.
        errors: float32 (changes, *weight's shape).
    """

    axis: int
    errors: Tensor


def channel_divergences(
    graph: GraphModule,
    inputs: Tensor,
    changes: Mapping[str, Change],
    *,
    batch_size: int,
    seed: int,
    draws: int = 2,
) -> dict[str, Tensor]:
    """Divergence in nats that each change causes in each output channel, to second order: float64 (changes, channels).

    The mean of a change over images and positions is taken out first at every use, as biases that absorb it do. Layers
    that `has_rows` does not take are absent.

    Args:
        graph: the float twin, its activations unquantized; logits (n, classes).
        inputs: float32 (n, ...), as the network takes them; whole batches where the graph takes one size only.
        changes: layer name to its changes.
        batch_size: images per run; all activations of a batch are in memory at once.
        seed: of the signs.
        draws: how many signs per image are averaged over.
    """
    generator = torch.Generator().manual_seed(seed)
    recorder = _Recorder(graph, changes)
    sums: dict[str, _Sums] = {}
    for batch in torch.split(inputs, batch_size):
        calls, gradients = recorder.record(batch, generator, draws)
        for layer, found in _projections(calls, gradients, changes).items():
            sums[layer] = sums[layer].plus(found) if layer in sums else found
    return {layer: found.centred() / (2 * draws * len(inputs)) for layer, found in sums.items()}


@final
@dataclass(frozen=True, eq=False)
class _Sums:
    """What the images seen so far add up to; ``a`` is a change along a gradient, ``b`` a shift of the mean along it."""

    aa: Tensor  # (changes, channels), over draws and images, a summed over the uses of the layer
    ab: Tensor  # (uses, changes, channels)
    bb: Tensor  # (uses, uses, channels)
    outputs: Tensor  # (uses, changes, channels), over images and positions
    count: Tensor  # (uses,), images and positions

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.aa + other.aa, self.ab + other.ab, self.bb + other.bb, self.outputs + other.outputs,
            self.count + other.count,
        )  # fmt: skip

    def centred(self) -> Tensor:
        """Sum of ``(a - sum over uses of mean b)**2``: (changes, channels)."""
        mean = self.outputs / self.count[:, None, None]
        shifts = torch.einsum("ukc,vkc,uvc->kc", mean, mean, self.bb)
        return (self.aa - 2 * (mean * self.ab).sum(0) + shifts).clamp_min(0.0)


@final
@dataclass(frozen=True, eq=False)
class _Call:
    node: Node
    args: tuple[Any, ...]
    output: Tensor


class _Recorder(Watcher):
    """Runs the network with the outputs of its layers tracked."""

    def __init__(self, graph: GraphModule, layers: Mapping[str, object]) -> None:
        super().__init__(graph)
        self._layers = layers
        self._calls: list[_Call] = []

    def record(
        self, batch: Tensor, generator: torch.Generator, draws: int
    ) -> tuple[list[_Call], list[tuple[Tensor, ...]]]:
        """The calls of all layers, and for every draw the gradients at their outputs."""
        self._calls = []
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.run(batch.clone())
            scores = functional.log_softmax(logits.double(), 1)
            weight = scores.detach().mul(0.5).exp()
            outputs = [call.output for call in self._calls]
            gradients = []
            for draw in range(draws):
                signs = torch.randint(0, 2, scores.shape, generator=generator) * 2 - 1
                found = torch.autograd.grad((signs * weight * scores).sum(), outputs, retain_graph=draw + 1 < draws)
                gradients.append(found)
        return self._calls, gradients

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if is_layer(n) and n.meta["layer"] in self._layers:
            args, _ = self.fetch_args_kwargs_from_env(n)
            if has_rows(n, args):
                result = result if result.requires_grad else result.detach().requires_grad_()
                self._calls.append(_Call(n, tuple(_detached(arg) for arg in args), result))
        return result


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _projections(
    calls: Sequence[_Call], gradients: Sequence[Sequence[Tensor]], changes: Mapping[str, Change]
) -> dict[str, _Sums]:
    """The sums over one batch for every layer, what its uses do to an image added up first."""
    parts: dict[str, list[tuple[Tensor, ...]]] = {}
    for position, call in enumerate(calls):
        layer = call.node.meta["layer"]
        slopes = torch.stack([_by_channel(call, draw[position]) for draw in gradients])
        parts.setdefault(layer, []).append(_of_use(call, slopes, changes[layer]))
    return {layer: _joined(*map(torch.stack, zip(*uses, strict=True))) for layer, uses in parts.items()}


def _of_use(call: _Call, slopes: Tensor, change: Change) -> tuple[Tensor, ...]:
    """What one call adds: along the gradients, the gradients summed, the changed outputs summed, and how many.

    A change E of a channel moves its outputs by ``E u`` for inputs u, so that ``sum_p g_p (E u_p)`` is ``E`` times the
    gradient of the channel's weights, ``sum_p g_p u_p``: one product for all changes. ``slopes`` are g, (draws, n,
    channels, positions).
    """
    along, total, errors = list[Tensor](), None, None
    for rows in input_rows(call.node, call.args):
        groups = len(rows)
        if errors is None:
            errors = torch.stack([as_rows(error, change.axis, groups) for error in change.errors])
        total = rows.sum(1, dtype=torch.float64) if total is None else total + rows.sum(1, dtype=torch.float64)
        images = rows.reshape(groups, -1, slopes.shape[3], rows.shape[2])
        most = max(1, WEIGHT_GRADIENTS // (len(slopes) * errors[0].numel()))
        for some in torch.split(images, most, 1):
            first = sum(part.shape[1] for part in along)
            here = slopes[:, first : first + some.shape[1]]
            here = here.reshape(*here.shape[:2], groups, -1, here.shape[3])
            gradient = torch.einsum("dngcp,gnpi->dngci", here, some)
            along.append(torch.einsum("dngci,fgci->dnfgc", gradient, errors).flatten(3))
    assert errors is not None
    assert total is not None
    outputs = torch.einsum("fgci,gi->fgc", errors.double(), total).flatten(1)
    count = torch.tensor(slopes.shape[1] * slopes.shape[3])
    return torch.cat(along, 1).double(), slopes.sum(3, dtype=torch.float64), outputs, count


def _joined(along: Tensor, shifts: Tensor, outputs: Tensor, count: Tensor) -> _Sums:
    """From (uses, draws, n, changes, channels), (uses, draws, n, channels) and the last two of `_Sums`."""
    a = along.sum(0)
    ab = torch.einsum("dnkc,udnc->ukc", a, shifts)
    return _Sums(a.square().sum((0, 1)), ab, torch.einsum("udnc,vdnc->uvc", shifts, shifts), outputs, count)


def _by_channel(call: _Call, output: Tensor) -> Tensor:
    """An output of the call as (n, channels, positions)."""
    if op_of(call.node) == "Conv":
        return output.flatten(2)
    return output.reshape(len(output), -1, output.shape[-1]).mT
