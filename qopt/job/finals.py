"""The last stage of the selection: the few plans that stay closest to float, held to the gates before one is emitted.

Three fidelities, each dearer and on fewer plans: a short PGD on few images while plans are searched and selected; here
FGSM and PGD-20 with fresh seeds on more of the select images; in the end the emitted file on the report images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

import torch
from torch import Tensor

from qopt.attacks import accuracy_vector, worst_case
from qopt.job.run import Run
from qopt.limits import Gate
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import Setting

FINALISTS: Final = {"fast": 1, "normal": 3, "max": 5}
"""By effort, plans that are held to the gates; of one there is nothing to choose."""

SHARE: Final = 2
"""Times as many images as plans are compared on, as far as there are select images."""


@final
@dataclass(frozen=True)
class Trial:
    """What a plan loses in the finals: float minus the plan, in points of accuracy; robust None where not attacked."""

    clean_drop: float
    robust_drop: float | None

    def excess(self, gates: tuple[Gate, ...]) -> float:
        """By how many points it misses the gates, summed; 0 where it holds them all. Intervals do not count here."""
        drops = {"clean_drop": self.clean_drop, "robust_drop": self.robust_drop}
        missed = [(drops.get(gate.name), gate.bound) for gate in gates]
        return sum(max(drop - bound, 0.0) for drop, bound in missed if drop is not None and bound is not None)


@final
class Finals:
    """Measures finalists against float on the select images.

    Args:
        run: a run with images.
    """

    def __init__(self, run: Run) -> None:
        assert run.data is not None
        few = run.data.select.first(SHARE * run.probe_images)
        self._run = run
        self._setting = Setting(
            torch.from_numpy(few.images), torch.from_numpy(few.labels), run.threat, run.seed("finals")
        )

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Those that accuracies decide."""
        return tuple(gate for gate in self._run.options.active_gates if gate.bound is not None)

    @property
    def places(self) -> int:
        """For how many plans there is room; 1 where no gate is to be held."""
        return FINALISTS[self._run.options.effort] if self.gates else 1

    @property
    def images(self) -> int:
        """On how many images plans are held to the gates."""
        return len(self._setting.images)

    def trial(self, twin: TwinClassifier) -> Trial:
        """Attack a plan's twin, and hold it against float on the same images."""
        clean, robust = self._right(twin)
        float_clean, float_robust = self._float
        lost = None if robust is None or float_robust is None else _points(float_robust) - _points(robust)
        return Trial(_points(float_clean) - _points(clean), lost)

    @cached_property
    def _float(self) -> tuple[Tensor, Tensor | None]:
        return self._right(self._run.float_twin)

    def _right(self, twin: TwinClassifier) -> tuple[Tensor, Tensor | None]:
        """Which images are right, and which stay so under every attack: bool (n,) each."""
        s = self._setting
        clean = accuracy_vector(twin, s.images, s.labels)
        if not self._run.options.robust:
            return clean, None
        held = [~attack(twin, s.images, s.labels, s.threat, seed=s.seed).fooled for attack in s.attacks]
        return clean, worst_case([clean, *held])


def _points(right: Tensor) -> float:
    return 100 * float(right.double().mean())
