"""Which formats an analysis looks at; nothing heavy is imported, so that a wrong word is refused at once."""

from __future__ import annotations

from qopt.errors import PlanError, UsageError
from qopt.hardware.targets import parse_target
from qopt.spec import WeightSpec


def analysed_formats(target: str, names: tuple[str, ...]) -> tuple[WeightSpec, ...]:
    """The formats called ``names``, each once, in their order; those of ``target`` where there are none.

    Raises:
        PlanError: a name that is none.
        UsageError: an unknown target, ``float``, which changes nothing, or formats of rows, which fit one layer only.
    """
    candidates = parse_target(target).weights
    found = []
    for name in names:
        try:
            spec = WeightSpec.parse(name)
        except PlanError as error:
            raise error.at("--formats") from error
        if spec.is_float or spec.rows:
            expected = "formats of whole layers with codes, such as int4 or log4:max"
            raise UsageError("not a candidate for every layer", where="--formats", got=repr(name), expected=expected)
        found.append(spec)
    return tuple(dict.fromkeys(found)) or candidates
