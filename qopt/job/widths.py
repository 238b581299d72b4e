"""Fewer bits for activations where a limit prices them: which tensors have how many, before formats are searched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from qopt.cache import digest_arrays
from qopt.job.lipschitz_limit import lipschitz_limit
from qopt.job.prices import fixed_costs
from qopt.job.run import Run
from qopt.job.sensitivity import affordable_images, form_of, sensitivity_images
from qopt.job.space import costs_of, price, takes
from qopt.measure.divergence import Probe, tensor_sensitivities
from qopt.plan import Plan
from qopt.search.space import Space
from qopt.search.thresholds import Thresholds, apply_thresholds
from qopt.search.widths import Costs, TensorSpace, Widths, best_in_one, choose_widths
from qopt.spec import ActivationSpec, WeightSpec


@final
@dataclass(frozen=True, eq=False)
class Narrowed:
    """A run whose tensors have the widths that were chosen, its space priced at them, and what is to be said of it.

    ``reasons`` has, by tensor with another format than the target's, why; tensors that are called like a layer are
    left out, as plans keep both kinds of reasons in one place. ``alike`` are the same with one format for all tensors:
    the target's, and the best of the others; sums of sensitivities mislead where bits are few.
    """

    run: Run
    space: Space
    note: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    alike: Mapping[ActivationSpec, Narrowed] = field(default_factory=dict)

    def said(self, plan: Plan) -> list[str]:
        """Of the plan that was chosen in the end."""
        chosen = {name: str(spec) for name, spec in self.run.narrow.items()}
        other = "" if plan.activations == chosen else "; measured, a plan with one format for all lost less"
        return [self.note + other] if self.note else []


def with_widths(run: Run, space: Space, thresholds: Thresholds, *, measured: bool, others: bool) -> Narrowed:
    """Choose the widths together with formats of the weights that the thresholds leave, and price the space at them.

    Everything stays as it is where the target offers one width, where no limit is on what fewer bits save, and where
    sensitivities of weights are not the divergences that those of activations are (``measured``: the strategy uses
    sensitivities at all). ``others``: whether to look for those with one format, too.

    Raises:
        InfeasibleError: no plan keeps the limits, whatever the widths.
    """
    if run.data is None or not run.target.narrower:
        return Narrowed(run, space)
    readers, first = _readers(run), run.target.activations
    costs = _costs(run, space, readers)
    if not _rewarded(space, costs):
        asked = run.options.activations is not None
        note = f"no limit is on what fewer bits of activations save: they stay {first}"
        return Narrowed(run, space, note if asked else "")
    if not measured or form_of(run) not in ("divergence", "clean-divergence") or lipschitz_limit(run) is not None:
        note = f"activations stay {first}: their widths are chosen by divergences alone, which this search or "
        return Narrowed(run, space, f"{note}sensitivity does not use, and under no limit on lipschitz")
    kept = apply_thresholds(_at_least(space, costs), thresholds).space
    table = _sensitivities(run, space, readers)
    tensors = [
        TensorSpace(name, layers, {spec: table[name, spec] for spec in _offered(run)})
        for name, layers in readers.items()
    ]
    found = choose_widths(kept, tensors, costs)
    narrow = {name: spec for name, spec in found.specs.items() if spec != first}
    layers = {layer.layer for layer in space.layers}
    reasons = {
        name: f"divergence {table[name, spec]:.3g} alone ({first} {table[name, first]:.3g}), read by "
        + ", ".join(readers[name])
        for name, spec in narrow.items() if name not in layers
    }  # fmt: skip
    alike = {first: Narrowed(run, space)} if narrow else {}
    if others and (one := best_in_one(kept, tensors, costs)) is not None:
        alike[one] = _narrowed(run, space, dict.fromkeys(readers, one))
    chosen = _narrowed(run, space, narrow)
    return replace(chosen, note=_account(run, found), reasons=reasons, alike=alike if others else {})


def _narrowed(run: Run, space: Space, narrow: Mapping[str, ActivationSpec]) -> Narrowed:
    other = replace(run, narrow=narrow)
    return Narrowed(other, _repriced(other, space))


def _offered(run: Run) -> tuple[ActivationSpec, ...]:
    return tuple(dict.fromkeys((run.target.activations, *run.target.narrower)))


def _readers(run: Run) -> dict[str, tuple[str, ...]]:
    """Tensor to the layers that read its codes; those that no layer reads are absent."""
    carried = {value: name for name, values in run.quantizer.tensors.items() for value in values}
    found: dict[str, dict[str, None]] = {}
    for layer in run.prepared.layers:
        for use in layer.uses:
            if use.input in carried:
                found.setdefault(carried[use.input], {})[layer.name] = None
    return {name: tuple(layers) for name, layers in found.items()}


def _costs(run: Run, space: Space, readers: Mapping[str, Sequence[str]]) -> Costs:
    """What every candidate costs at every width; what a layer writes counts as wide as it can be."""
    reading = {name for layers in readers.values() for name in layers}
    found: dict[tuple[str, int], dict[WeightSpec, Mapping[str, float]]] = {}
    for layer in space.layers:
        specs = [candidate.spec for candidate in layer.candidates]
        described = run.network.layer(layer.layer)
        for bits in sorted({spec.bits for spec in _offered(run)}) if layer.layer in reading else ():
            at = replace(described, input_bits=bits)
            found[layer.layer, bits] = {spec: price(run, at, spec) for spec in specs if takes(run, at, spec)}
        if layer.layer not in reading:
            found[layer.layer, 0] = {spec: price(run, described, spec) for spec in specs}
    return found


def _rewarded(space: Space, costs: Costs) -> bool:
    """Whether a limit is on something that any layer spends less of at fewer bits."""
    columns = {row.column for row in space.rows()}
    by_layer: dict[str, list[Mapping[WeightSpec, Mapping[str, float]]]] = {}
    for (name, _), priced in costs.items():
        by_layer.setdefault(name, []).append(priced)
    return any(
        len({priced[spec].get(column) for priced in widths if spec in priced}) > 1
        for widths in by_layer.values() for spec in widths[0] for column in columns
    )  # fmt: skip


def _at_least(space: Space, costs: Costs) -> Space:
    """The space as cheap as any width makes it: what thresholds must leave a plan of."""
    least: dict[str, Mapping[WeightSpec, Mapping[str, float]]] = {}
    for (name, _), priced in sorted(costs.items(), key=lambda entry: entry[0]):
        least.setdefault(name, priced)
    return _priced(space, least)


def _sensitivities(
    run: Run, space: Space, readers: Mapping[str, Sequence[str]]
) -> Mapping[tuple[str, ActivationSpec], float]:
    """What each format of each tensor alone does to the predictions, in nats, on the images of the weights'; cached."""
    run.progress("sensitivity of every tensor and width")
    offered = _offered(run)
    reading = {name for layers in readers.values() for name in layers}
    versions = {layer.layer: offered if layer.layer in reading else () for layer in space.layers}
    images = sensitivity_images(run, affordable_images(run.prepared, versions))
    pairs = [(name, spec) for name in readers for spec in offered]
    key = {
        "model": run.prepared.digest, "images": digest_arrays(images.numpy()), "pairs": [[n, str(s)] for n, s in pairs],
        "normalisation": [run.options.mean, run.options.std],
        "calibration": digest_arrays(_calibration(run)),
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        twin = run.float_twin
        found = tensor_sensitivities(run.quantizer, twin, Probe.of(twin, images), dict.fromkeys(readers, offered))
        return {"values": np.array([found[pair] for pair in pairs])}

    values = run.cache.arrays("tensor-sensitivities", key, compute)["values"]
    return {pair: float(value) for pair, value in zip(pairs, values, strict=True)}


def _calibration(run: Run) -> np.ndarray:
    assert run.quantizer.calibration is not None
    return np.asarray(run.quantizer.calibration.numpy())


def _repriced(run: Run, space: Space) -> Space:
    """The space at the widths of the run."""
    table = {}
    for layer in space.layers:
        described, specs = run.network.layer(layer.layer), [candidate.spec for candidate in layer.candidates]
        table[layer.layer] = {spec: price(run, described, spec) for spec in specs if takes(run, described, spec)}
    return replace(_priced(space, table), fixed=fixed_costs(run, {name: tuple(row) for name, row in table.items()}))


def _priced(space: Space, table: Mapping[str, Mapping[WeightSpec, Mapping[str, float]]]) -> Space:
    """The space with the costs in ``table``, without the formats of a layer that are not there."""
    layers = (
        replace(
            layer,
            candidates=tuple(
                replace(c, costs=costs_of(table[layer.layer][c.spec]))
                for c in layer.candidates if c.spec in table[layer.layer]
            ),
        )
        for layer in space.layers
    )  # fmt: skip
    return replace(space, layers=tuple(layers))


def _account(run: Run, found: Widths) -> str:
    counts = Counter(str(spec) for spec in found.specs.values())
    said = ", ".join(f"{count} {spec}" for spec, count in sorted(counts.items()))
    text = f"formats of the {len(found.specs)} tensors that layers read, chosen with those of the weights: {said}"
    text += f"; no others lower the summed sensitivity by more than {100 * found.gap:.2f} %"
    if found.left:
        text += f"; {len(found.left)} that too many layers read together stay {run.target.activations}"
    return text
