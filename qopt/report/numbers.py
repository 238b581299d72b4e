"""Accuracies and their differences as every table shows them."""

from __future__ import annotations

from qopt.report.model import Drop, Share


def share(value: Share | None) -> str:
    """``87.3 % (85.1-89.2)``."""
    return "-" if value is None else f"{value.value:.1f} % ({value.low:.1f}-{value.high:.1f})"


def drop(value: Drop | None) -> str:
    """``+1.2 +- 0.4``: float minus this network in points, with the paired standard error."""
    return "-" if value is None else f"{value.value:+.1f} +- {value.standard_error:.1f}"


def short_name(name: str) -> str:
    """A network's name with baselines as the command line spells them, which leaves room on a phone."""
    return name.removeprefix("uniform ").replace(", activations ", "@")
