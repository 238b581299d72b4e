"""Decide the gates: each is held against the upper end of its interval."""

from __future__ import annotations

from qopt.errors import UsageError
from qopt.job.run import Run
from qopt.limits import Gate
from qopt.report.model import GateRow, Row, SearchFacts


def judge(gates: tuple[Gate, ...], row: Row) -> list[GateRow]:
    """One line per gate for the emitted file's row.

    Raises:
        UsageError: a gate on attacks in a run that attacks nothing.
    """
    return [_judge(gate, row) for gate in gates]


def threshold_gates(run: Run, facts: SearchFacts) -> list[GateRow]:
    """Thresholds that the user set are a gate: it fails where they had to be relaxed."""
    if run.options.thresholds in ("auto", "none") or run.plan is not None:
        return []
    found = "met" if facts.factor <= 1 else f"relaxed by {facts.factor:.3g}"
    return [GateRow(gate=f"thresholds {facts.thresholds}", found=found, holds=facts.factor <= 1)]


def _judge(gate: Gate, row: Row) -> GateRow:
    if gate.name == "masking":
        if row.masking == "not checked":
            raise _needs_robust(gate)
        return GateRow(gate=str(gate), found=row.masking, holds=row.masking == "none")
    found = row.clean_drop if gate.name == "clean_drop" else row.robust_drop
    if found is None or gate.bound is None:
        raise _needs_robust(gate)
    text = f"{found.value:.2f} points, at most {found.high:.2f} at 95 %"
    return GateRow(gate=str(gate), found=text, holds=found.high <= gate.bound)


def _needs_robust(gate: Gate) -> UsageError:
    return UsageError("the gate needs attacks", where="--gate", got=str(gate), fix="add --robust")
