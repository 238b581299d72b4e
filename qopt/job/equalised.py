"""Whether the chosen plan stays closer to float on the network whose channels are evened out: measured, not assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qopt.config import Options
from qopt.job.choose import Choice, described
from qopt.job.run import Run
from qopt.job.select import duel, total
from qopt.quantize import Applied
from qopt.report.model import EvaluatedPlan


def tries_equalisation(options: Options, given: bool) -> bool:
    """Whether equalisation is left open; ``given``: the user brought a plan, which says so itself.

    Not under a limit on the Lipschitz constant, which is held by the norms of the network as it is.
    """
    limited = any(limit.quantity == "lipschitz" for limit in options.limits)
    return options.equalisation == "auto" and options.effort == "max" and not given and not limited


def contest_equalisation(run: Run, choice: Choice, equalised: Callable[[], Run]) -> tuple[Run, Choice]:
    """The run and the choice that stay, the account of both in it; ``equalised`` begins the same run on that network.

    The formats, the rounding and the images are those of ``choice``; ranges are observed anew.
    """
    chosen = next((row for row in choice.facts.evaluated if row.chosen), None)
    if chosen is None:  # without data nothing was measured
        return run, choice
    assert isinstance(choice.applied, Applied)
    other = equalised()
    if other.prepared.digest == run.prepared.digest:
        return run, choice
    plan = choice.applied.plan.with_changes(ranges={}, equalisation=True, model=other.prepared.digest)
    name = chosen.name.split(",")[0] + ", equalised"
    applied, standing, row = duel(run, choice.applied, other, name, plan)
    if total(row) >= total(standing):
        return run, _with_account(choice, [*choice.facts.evaluated, row.model_copy(update={"chosen": False})])
    other.left_out[:], other.warnings[:] = run.left_out, run.warnings
    rows = [old.model_copy(update={"chosen": False}) for old in choice.facts.evaluated]
    return other, _with_account(described(other, applied, choice.facts), [*rows, row])


def _with_account(choice: Choice, evaluated: list[EvaluatedPlan]) -> Choice:
    return replace(choice, facts=choice.facts.model_copy(update={"evaluated": evaluated}))
