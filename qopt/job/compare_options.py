"""The options of `qopt compare`, and the command that runs it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import final

from qopt.errors import UsageError, nearest
from qopt.job.compare_examples import METHODS, Method
from qopt.measure.network import Normalisation
from qopt.threat import Norm, ThreatModel, check_declared


@final
@dataclass(frozen=True)
class CompareOptions:
    """What `qopt compare` may be told; the attacks are set up as those of Bernhard et al. 2019, with fewer steps.

    Attributes:
        attacks: of ``fgsm``, ``bim``, ``pgd``, ``cw`` and ``spsa``, in the order of the report.
        norm: of the threat model of all but ``cw``, which has no bound.
        eps: its radius, pixels in [0, 1]; None for the default of the number of channels.
        images: test images, at most.
        steps: of the iterated attacks, 100 in the paper; of ``cw``, for each of its 10 constants.
        kappas: leads in logits that examples of ``cw`` must have, each 0 or larger; those that transfer best count.
        mean: per-channel mean, where normalisation lies outside all the networks; ``std`` likewise.
        seed: every random choice derives from it.

    Raises:
        UsageError: an option is out of its range.
    """

    attacks: tuple[str, ...] = ("fgsm", "bim", "cw", "spsa")
    norm: Norm = "linf"
    eps: float | None = None
    images: int = 100
    steps: int = 40
    kappas: tuple[float, ...] = (5.0, 15.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "steps"):
            if getattr(self, name) < 1:
                raise UsageError("must be at least 1", where=f"--{name}", got=str(getattr(self, name)))
        for name in self.attacks:
            if name not in METHODS:
                raise UsageError("unknown attack", where="--attack", got=repr(name), fix=nearest(name, METHODS))
        for flag, values in (("--attack", self.attacks), ("--kappa", self.kappas)):
            if not values or len(set(values)) < len(values):
                raise UsageError("one or more are needed, all different", where=flag, got=str(values))
        if not all(isfinite(kappa) and kappa >= 0 for kappa in self.kappas):
            raise UsageError("kappa must be a finite number, 0 or larger", where="--kappa", got=str(self.kappas))
        check_declared(self.norm, self.eps)
        Normalisation(self.mean, self.std)

    def methods(self, threat: ThreatModel) -> list[Method]:
        """The attacks with the steps and leads asked for."""
        return [METHODS[name](threat, self.steps, self.kappas) for name in self.attacks]


def command_line(models: Sequence[str | Path], data: str | None, options: CompareOptions) -> str:
    """A shell command equal to the call: every option that is not at its default, without the output folder."""
    words = ["qopt", "compare", *map(str, models), *(["--data", data] if data else [])]
    flags = {"attacks": "--attack", "kappas": "--kappa"}
    for field in fields(CompareOptions):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        flag = flags.get(field.name, f"--{field.name}")
        if field.name == "attacks":
            words += [word for name in value for word in (flag, name)]
        elif isinstance(value, tuple):
            words += [flag, ",".join(f"{entry:g}" for entry in value)]
        else:
            words += [flag, f"{value:.17g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
