"""What a whole plan costs on the target's machines: beside the layers, at once in memory, and in all against limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qopt.errors import InfeasibleError
from qopt.hardware.cost_model import peak
from qopt.job.run import Run
from qopt.limits import Limit, readable
from qopt.quantize import AppliedWeights
from qopt.report.model import LimitRow
from qopt.search.rows import RowChoices, allocate_rows
from qopt.search.space import Outcome, Space, column_of
from qopt.size import code_bits, stored_bytes
from qopt.spec import WeightSpec

TRIES = 4
"""How often formats of rows are looked for under limits that are tightened by what they were exceeded."""

ROUNDED = 1 + 1e-9
"""A limit is kept up to this share of it: sums are off by rounding."""


def fixed_costs(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]]) -> dict[str, float]:
    """Column to what any plan spends of it beside its layers: steps without weights, the program itself."""
    if not all(candidates.values()):
        return {}
    layers, specs = run.network.layers, {name: formats[0] for name, formats in candidates.items()}
    found = {}
    for model in run.cost_models:
        shared = [quantity for quantity in model.prices if quantity in model.totals]
        total = model.network_cost(layers, specs, run.network.steps) if shared else {}
        for quantity in shared:
            alone = sum(model.layer_cost(layer, specs[layer.name])[quantity] for layer in layers)
            found[column_of(quantity, model.name)] = max(total[quantity] - alone, 0.0)
    return found


def check_memory(run: Run) -> None:
    """Hold the activations to limits on SRAM: their widths are the target's, whatever the weights get.

    Raises:
        InfeasibleError: at one step more is live at once than a limit allows.
    """
    limit = min((limit for limit in run.target.limits if limit.quantity == "sram"), default=None)
    widest = None if limit is None else peak(run.network.steps)
    if limit is None or widest is None or widest.bytes <= limit.bound:
        return
    tensors = ", ".join(f"{one.name} {readable('sram', one.bytes)}" for one in widest.live)
    raise InfeasibleError(
        "no plan keeps the limit", where=str(limit),
        got=f"at least {readable('sram', widest.bytes)} with {_activations(run)} activations at node {widest.name}: "
        f"{tensors}",
        fix="raise the limit" if run.data is not None else "raise the limit, or give --data for 8-bit activations",
    )  # fmt: skip


def spent(run: Run, applied: AppliedWeights) -> list[str]:
    """One clause per machine with what the plan costs there."""
    network = run.network_of(applied.plan)
    specs = {layer.name: applied.quantized.spec(layer.name) for layer in network.layers}
    said = []
    for model in run.cost_models:
        if model.name == "bits":
            continue
        total = model.network_cost(network.layers, specs, network.steps)
        said.append(f"on {model.name}: " + ", ".join(_cost(run, quantity, cost) for quantity, cost in total.items()))
    return said


def limit_rows(run: Run, applied: AppliedWeights) -> list[LimitRow]:
    """Every limit that costs decide, held against the plan as it was made real, on every machine that prices it.

    A plan that the user brought is not held to the average of bits that a target's name stands for.
    """
    stored = list(applied.quantized.stored(run.prepared))
    network = run.network_of(applied.plan)
    specs = {layer.name: applied.quantized.spec(layer.name) for layer in network.layers}
    totals = {"stored": {"bits": code_bits(stored), "size": float(stored_bytes(stored))}}
    for model in run.cost_models:
        if model.name != "bits" and any(limit.quantity in model.totals for limit in run.target.limits):
            totals[model.name] = dict(model.network_cost(network.layers, specs, network.steps))
    return [
        limit_row(limit, machine, total[limit.quantity])
        for limit in run.target.limits
        if run.plan is None or limit.quantity != "bits" or limit in run.options.limits
        for machine, total in totals.items()
        if limit.quantity in total
    ]


def limit_row(limit: Limit, machine: str, value: float) -> LimitRow:
    """One line of the report."""
    return LimitRow(
        limit=str(limit), machine=machine, value=value, bound=limit.bound, found=readable(limit.quantity, value),
        holds=value <= limit.bound * ROUNDED,
    )  # fmt: skip


def excess(run: Run, specs: Mapping[str, WeightSpec]) -> float:
    """The largest cost of a plan as a share of its limit, over the machines that price it; 0 without such limits."""
    shares = [0.0]
    for model in run.cost_models:
        limits = [limit for limit in run.target.limits if limit.quantity in model.totals]
        total = model.network_cost(run.network.layers, specs, run.network.steps) if limits else {}
        if model.name != "bits":
            shares += [total[limit.quantity] / max(limit.bound, 1e-300) for limit in limits]
    return max(shares)


def allocate_within(run: Run, space: Space, rows: Mapping[str, RowChoices]) -> Outcome:
    """`allocate_rows` within the limits as whole plans are priced.

    A weight of several formats costs more than its rows do: the order of channels, and codes that fill bytes.

    Raises:
        InfeasibleError: no formats of rows were found that keep them.
    """
    for _ in range(TRIES):
        outcome = allocate_rows(space, rows)
        over = excess(run, outcome.specs)
        if over <= ROUNDED:
            return outcome
        tighter = (
            limit if limit.quantity in ("bits", "size") else replace(limit, bound=limit.bound / over)
            for limit in space.limits
        )
        space = replace(space, limits=tuple(tighter))
    raise InfeasibleError("no formats of rows keep the limits", got=", ".join(map(str, run.target.limits)))


def _cost(run: Run, quantity: str, cost: float) -> str:
    limits: list[Limit] = [limit for limit in run.target.limits if limit.quantity == quantity]
    text = f"{quantity} {readable(quantity, cost)}"
    return f"{text} (limit {readable(quantity, min(limits).bound)})" if limits else text


def _activations(run: Run) -> str:
    return "float" if run.data is None else str(run.target.activations)
