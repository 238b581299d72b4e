"""Plans as text: one in a few lines, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping

from qopt.columns import columns, section
from qopt.plan import Plan
from qopt.spec import WeightSpec

LONGEST = 44
"""Characters of a format that are shown: one with rows can name hundreds of them."""


def show_plan(plan: Plan) -> str:
    """The plan for people: what holds for all of it, then every layer and tensor that it names, aligned."""
    facts = [
        ("defaults", f"weights {plan.defaults.weights}, activations {plan.defaults.activations}"),
        ("rounding", _rounding(plan)),
        ("model", plan.model[:12] or "any"),
        ("images", plan.data[:12] or "none"),
        ("digest", plan.digest[:12]),
    ]
    weights = [(name, _short(spec), plan.reasons.get(name, "")) for name, spec in plan.weights.items()]
    activations = [
        (name, spec, _range(plan, name), plan.reasons.get(name, "")) for name, spec in _activations(plan).items()
    ]
    parts = [columns(facts), section("weights", weights), section("activations", activations)]
    parts += [section("ties", [(", ".join(group),) for group in plan.ties])]
    return "\n\n".join(part for part in parts if part) + "\n"


def diff_plans(old: Plan, new: Plan) -> str:
    """What differs, one line each, ``-`` what only the old plan has and ``+`` what only the new one; empty for equals.

    Reasons are not compared: they change nothing.
    """
    lines = []
    for key in ("rounding", "bias_correction", "equalisation", "model", "data", "ties"):
        before, after = getattr(old, key), getattr(new, key)
        lines += _change(key, None if before == after else (before, after))
    for title in ("weights", "activations"):
        before, after = getattr(old.defaults, title), getattr(new.defaults, title)
        lines += _change(f"defaults.{title}", None if before == after else (before, after))
    for title in ("weights", "activations", "ranges"):
        lines += _entries(title, getattr(old, title), getattr(new, title))
    return "\n".join(lines) + ("\n" if lines else "")


def _entries(title: str, old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            lines += [f"- {title}.{name}  {_value(old[name])}"] if name in old else []
            lines += [f"+ {title}.{name}  {_value(new[name])}"] if name in new else []
    moved = [name for name in old if name in new] != [name for name in new if name in old]
    if moved and any("*" in name or "?" in name or "[" in name for name in (*old, *new)):
        lines.append(f"~ {title}: the order of globs differs, and later ones override earlier ones")
    return lines


def _change(key: str, values: tuple[object, object] | None) -> list[str]:
    return [] if values is None else [f"- {key}  {_value(values[0])}", f"+ {key}  {_value(values[1])}"]


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.6g} to {value[1]:.6g}"
    return "(empty)" if value in ("", []) else str(value)


def _rounding(plan: Plan) -> str:
    words: list[str] = [plan.rounding]
    words += ["bias correction"] if plan.bias_correction else []
    words += ["equalised channels"] if plan.equalisation else []
    return ", ".join(words)


def _activations(plan: Plan) -> dict[str, str]:
    """The formats that the plan names, and those of tensors that have a range by its defaults."""
    return {**dict.fromkeys(plan.ranges, plan.defaults.activations), **plan.activations}


def _range(plan: Plan, name: str) -> str:
    return f"{plan.ranges[name][0]:.4g} to {plan.ranges[name][1]:.4g}" if name in plan.ranges else ""


def _short(spec: str) -> str:
    parsed = WeightSpec.parse(spec)
    if parsed.rows:
        counts = ", ".join(f"{count} x {row}" for row, count in parsed.row_counts.items())
        return f"rows: {counts}"
    return spec if len(spec) <= LONGEST else f"{spec[: LONGEST - 3]}..."
