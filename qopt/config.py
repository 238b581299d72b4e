"""The options of one run, as the command line and the Python call set them; the resolved ones go to the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final, get_args

from qopt.errors import UsageError
from qopt.limits import ROBUST_GATES, Gate, Limit
from qopt.spec import ActivationSpec, WeightSpec
from qopt.threat import Norm

ThresholdForm = Literal["auto", "paper", "relative", "weighted", "none"]
BiasCorrection = Literal["auto", "on", "off"]

_WORDS: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "thresholds": get_args(ThresholdForm),
    "bias_correction": get_args(BiasCorrection),
}


def parse_baseline(text: str) -> tuple[WeightSpec, ActivationSpec]:
    """Read ``WEIGHTS`` or ``WEIGHTS@ACTIVATIONS``; activations default to int8. Raises PlanError."""
    weights, _, activations = text.partition("@")
    return WeightSpec.parse(weights), ActivationSpec.parse(activations or "int8")


@final
@dataclass(frozen=True)
class Options:
    """What `qopt optimize` may be told.

    Attributes:
        target: one or more target names, joined by commas.
        robust: thresholds filter, sensitivities are measured on adversarial examples, the attacks run and the gates
            of robustness apply.
        search: a name in the group `qopt.searches`.
        limits: limits beside those of the target.
        gates: conditions on the emitted file; None for the defaults (three with ``robust``, else none).
        norm: of the threat model.
        eps: its radius, pixels in [0, 1]; None for the default of the number of channels.
        thresholds: form of the Lipschitz thresholds; ``auto`` is ``weighted`` with data, else ``paper``.
        threshold: the bound of ``relative`` and ``weighted``.
        activations: format of activations in place of the target's, or None.
        baselines: plans to measure beside the chosen one, ``WEIGHTS`` or ``WEIGHTS@ACTIVATIONS`` (``int4:max``,
            ``int8@int4``), uniform and rounded to nearest; activations default to int8.
        bias_correction: ``auto`` chooses by measurement on the select images.
        mean: per-channel mean, where normalisation lies outside the network; ``std`` likewise.
        calibration_images: images that ranges and moments are observed on, at most.
        probe_images: images on which sensitivities and plans are compared, at most.
        attack_images: report images that are attacked, at most; clean accuracy is always on all.
        seed: every random choice derives from it.
    """

    target: str = "int4"
    robust: bool = False
    search: str = "greedy"
    limits: tuple[Limit, ...] = ()
    gates: tuple[Gate, ...] | None = None
    norm: Norm = "linf"
    eps: float | None = None
    thresholds: ThresholdForm = "auto"
    threshold: float = 0.25
    activations: str | None = None
    baselines: tuple[str, ...] = ("int4:max",)
    bias_correction: BiasCorrection = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    calibration_images: int = 512
    probe_images: int = 256
    attack_images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration_images", "probe_images", "attack_images"):
            if getattr(self, name) < 1:
                raise UsageError(
                    "must be at least 1", where=f"--{name.replace('_', '-')}", got=str(getattr(self, name))
                )
        if not self.threshold > 0:
            raise UsageError("must be positive", where="--threshold", got=str(self.threshold))
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise UsageError(
                    "unknown word", where=f"--{name.replace('_', '-')}", expected=", ".join(words),
                    got=repr(getattr(self, name)),
                )  # fmt: skip
        for baseline in self.baselines:
            parse_baseline(baseline)
        if self.activations is not None:
            ActivationSpec.parse(self.activations)

    @property
    def active_gates(self) -> tuple[Gate, ...]:
        """The gates that decide the exit code."""
        if self.gates is not None:
            return self.gates
        return ROBUST_GATES if self.robust else ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the manifest, limits and gates as users write them."""
        plain = asdict(self)
        plain["limits"] = [str(limit) for limit in self.limits]
        plain["gates"] = [str(gate) for gate in self.active_gates]
        return plain


@final
@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        path: the file.
        factory: ``package.module:name`` of the network that a state dict belongs to.
        trust: load formats that can run code.
        input_shape: shape of one image, where the file does not tell.
    """

    path: str
    factory: str | None = None
    trust: bool = False
    input_shape: tuple[int, ...] | None = field(default=None)
