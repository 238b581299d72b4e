"""Train the rounding of weights, layer after layer or block after block, on the outputs of the float network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.errors import DataError, UsageError, VerificationError
from qopt.passes.base import Result
from qopt.passes.block_run import BlockRun, BlockTarget, channel_means, computed, constants
from qopt.passes.blocks import Block, Granularity, blocks
from qopt.passes.correct_biases import BiasCorrector, ChannelMeans
from qopt.passes.insert_weight_quantizers import WeightQuantizer
from qopt.passes.nodes import constant_of, is_layer, weight_chain, weight_source
from qopt.quant import AnyWeight
from qopt.quant.adaround import beta_at, penalty
from qopt.quant.soft_weight import SoftWeight, better_channels
from qopt.seeds import derive

Target = Literal["own", "float"]


@final
@dataclass(frozen=True, eq=False)
class RoundAdaRound:
    """Sequential AdaRound on the partly quantized network, activation quantizers included (straight through).

    Every block starts from the codes that the graph has, keeps their scales, and moves each weight by one level at
    most. What is trained is the mean squared error of the block's outputs; codes that come out no better over all
    images than the ones it started from are given up (those of single channels where a layer is trained alone), so that
    no block ends worse. A weight that is used in several
    blocks keeps its codes, and a note names it. The activations of one block, of both
    networks, are in memory at once.

    Attributes:
        images: float32 (n, ...), as the network takes them; whole batches where the graph takes one batch size only.
        reference: the float graph with the same layers and node names.
        batch_size: images per run and per training step. Means are taken over a batch in training: where ``centred``, a
            matrix product that sees a single row of each batch has no error left to train on and keeps its codes.
        steps: training steps per block.
        learning_rate: of Adam, on the V of `SoftRounding`.
        regulariser: weight of the penalty, a mean over weights, against the error in parts of the starting one.
        warm_up: the part of the steps without a penalty.
        target: ``own`` keeps what the float layers make of the block's own inputs; ``float`` what the float network
            computes, so that a block makes up for the errors of those before it.
        granularity: ``layer`` (with the ReLU or Clip that follows), or ``block`` (BRECQ, see `blocks`).
        block: layers that are trained together where no branch says which, at most.
        seed: of the order in which images are seen.
        centred: let the bias absorb the mean: in training every layer's outputs are shifted to the target's mean, and
            afterwards the mean of every output channel is the float network's over ``images``.
        weights: layer name to its codes, filled by the pass; layers that kept theirs are included.
        biases: (layer, use) to its new bias float32 (channels,), filled by the pass where ``centred``.

    Raises:
        UsageError: for options out of range.
    """

    images: Tensor
    reference: GraphModule
    batch_size: int = 32
    steps: int = 500
    learning_rate: float = 0.1
    regulariser: float = 100.0
    warm_up: float = 0.2
    target: Target = "float"
    granularity: Granularity = "layer"
    block: int = 3
    seed: int = 0
    centred: bool = True
    weights: dict[str, AnyWeight] = field(default_factory=dict)
    biases: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "round-adaround"
    tolerance: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        beta_at(0, self.steps, self.warm_up)
        for key in ("batch_size", "learning_rate", "block"):
            if not getattr(self, key) > 0:
                raise UsageError("must be positive", where=key, got=str(getattr(self, key)))
        if not self.regulariser >= 0:
            raise UsageError("must not be negative", where="regulariser", got=str(self.regulariser))

    def __call__(self, graph: GraphModule) -> Result:
        """Train the codes of every layer that has some, and give it a new bias where ``centred``.

        Raises:
            DataError: outputs of a block that are not finite.
            VerificationError: the reference is not the float network of this graph.
        """
        with torch.no_grad():
            rounder = _Rounder(graph, torch.split(self.images, self.batch_size), self)
            rounder.run_all()
        rounder.write(self.biases)
        self.weights.update(rounder.codes)
        trained = len(rounder.codes) - len(rounder.kept)
        notes = [f"{trained} weights rounded by AdaRound, {self.granularity} by {self.granularity}"] if trained else []
        if rounder.kept:
            notes.append(f"codes kept, no one block trains them: {', '.join(rounder.kept)}")
        return Result(graph, bool(rounder.codes), tuple(notes))


class _Reference(ChannelMeans):
    """The float network, run as far as the quantized one."""

    def __init__(self, graph: GraphModule, batches: tuple[Tensor, ...]) -> None:
        super().__init__(graph, batches)
        self._ahead = list(reversed(graph.graph.nodes))
        self._by_name = {node.name: node for node in graph.graph.nodes}

    def twin(self, node: Node) -> Node:
        """The same node of the float network; of an activation quantizer, the node that it quantizes."""
        while node.op == "call_module":
            (node,) = node.all_input_nodes
        found: Node | None = self._by_name.get(node.name)
        if found is None or any(found.meta.get(key) != node.meta.get(key) for key in ("layer", "use")):
            where = str(node.meta.get("layer", node.name))
            raise VerificationError("the float graph does not have this layer here", where=where, expected=node.name)
        return found

    def run_before(self, node: Node) -> None:
        """Run everything before a node that has not been run."""
        while self._ahead[-1] is not node:
            self.step(self._ahead.pop())

    def run_through(self, node: Node) -> None:
        """Run everything up to and including a node that has not been run."""
        self.run_before(node)
        self.step(self._ahead.pop())


class _Rounder(BiasCorrector):
    def __init__(self, graph: GraphModule, batches: tuple[Tensor, ...], options: RoundAdaRound) -> None:
        self._reference = _Reference(options.reference, batches)
        super().__init__(graph, batches, self._reference.means)
        self._options = options
        self._blocks = {block.nodes[0]: block for block in blocks(graph, options.granularity, options.block)}
        self._uses = Counter(node.meta["layer"] for node in graph.graph.nodes if is_layer(node))
        self.codes: dict[str, AnyWeight] = {}
        self.kept: list[str] = []

    def before(self, node: Node) -> None:
        """Train the block that starts here; run the float network to its end."""
        block = self._blocks.get(node)
        if block is None:
            return
        self._reference.run_before(self._reference.twin(node))
        given = self._trainable(block)
        if given:
            for name, weight in self._trained(block, given).items():
                self._quantizer(block, name).weight = self.codes[name] = weight
            self._refresh(block)
        self._reference.run_through(self._reference.twin(block.nodes[-1]))

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs, under the new bias where the options ask for one."""
        return super().layer(node, outputs) if self._options.centred else outputs

    def _trainable(self, block: Block) -> dict[str, AnyWeight]:
        """The codes of the layers that can be trained in this block; what the others have is put down."""
        found = {}
        for name, uses in Counter(node.meta["layer"] for node in block.layers).items():
            if weight_source(_first_use(block, name)).op != "call_module":
                continue
            weight = self.codes[name] = self._quantizer(block, name).weight
            if uses == self._uses[name]:
                found[name] = weight
            elif name not in self.kept:
                self.kept.append(name)
        return found

    def _quantizer(self, block: Block, name: str) -> WeightQuantizer:
        module = self.fetch_attr(str(weight_source(_first_use(block, name)).target))
        assert isinstance(module, WeightQuantizer)
        return module

    def _trained(self, block: Block, given: Mapping[str, AnyWeight]) -> Mapping[str, AnyWeight]:
        """The codes after training where they are better (channel by channel for a single layer), else those given."""
        run = BlockRun(self, block, self._targets(block), set(given), self._options.centred)
        before = run.errors(given)
        if not bool(before.isfinite().all()):
            raise DataError("outputs that are not finite", where=next(iter(given)), fix="check the model and its data")
        if not bool(before.sum() > 0):
            return given
        soft = {name: SoftWeight(self._float_weight(block, name), codes) for name, codes in given.items()}
        self._descend(run, soft, float(before.sum()))
        rounded = {name: rounding.rounded() for name, rounding in soft.items()}
        better = run.errors(rounded) < before
        return {name: better_channels(given[name], rounded[name], better) for name in given}

    def _descend(self, run: BlockRun, soft: Mapping[str, SoftWeight], before: float) -> None:
        """Adam on the error in parts of the starting one, plus the penalty, both times the number of weights."""
        options, count = self._options, len(self.environments)
        trained = [v for rounding in soft.values() for v in rounding.trained]
        optimizer = torch.optim.Adam(trained, lr=options.learning_rate)
        weights = sum(v.numel() for v in trained)
        generator = torch.Generator().manual_seed(derive(options.seed, "adaround", *soft))
        order: list[int] = []
        for step in range(options.steps):
            order = order or torch.randperm(count, generator=generator).tolist()
            beta = beta_at(step, options.steps, options.warm_up)
            with torch.enable_grad():
                parts = {name: rounding.parts for name, rounding in soft.items()}
                loss = run.squares(order.pop(), {name: soft[name].weight(part) for name, part in parts.items()})
                loss = loss * (weights * count / before)
                if beta is not None:
                    every = [part for several in parts.values() for part in several]
                    loss = loss + options.regulariser * sum(penalty(part, beta) for part in every)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _float_weight(self, block: Block, name: str) -> Tensor:
        call = self._reference.twin(_first_use(block, name))
        return constant_of(self._options.reference, weight_source(call))

    def _targets(self, block: Block) -> list[BlockTarget]:
        """What the float block makes of every batch of the inputs that the options name."""
        reference, twin = self._reference, self._reference.twin
        nodes = list(dict.fromkeys(map(twin, block.nodes)))
        layers = {node: twin(node) for node in block.layers}
        fixed = constants(reference, nodes)
        found = []
        for own, floats in zip(self.environments, reference.environments, strict=True):
            inputs = {twin(n): own[n] if self._options.target == "own" else floats[twin(n)] for n in block.inputs}
            values = computed(reference, nodes, {**fixed, **inputs})
            means = {node: channel_means(node, values[float_node]) for node, float_node in layers.items()}
            outputs = {node: values[twin(node)] for node in block.outputs}
            found.append(
                BlockTarget({n: v for n, v in outputs.items() if torch.is_tensor(v) and v.is_floating_point()}, means)
            )
        return found

    def _refresh(self, block: Block) -> None:
        """Compute weights anew that the graph has computed already, and the transposes between them and the call."""
        for node in block.layers:
            chain = weight_chain(node)
            if chain[-1] in self.environments[0]:
                self.refresh(chain)


def _first_use(block: Block, name: str) -> Node:
    return next(node for node in block.layers if node.meta["layer"] == name)
