"""The options of one run, as the command line and the Python call set them; the resolved ones go to the manifest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, final, get_args

from qopt.errors import PlanError, UsageError, nearest
from qopt.limits import ROBUST_GATES, Gate, Limit, parse_gate, parse_limit
from qopt.spec import ActivationSpec, WeightSpec
from qopt.threat import Norm, check_declared, parse_eps

ThresholdForm = Literal["auto", "paper", "relative", "weighted", "none"]
BiasCorrection = Literal["auto", "on", "off"]
Rounding = Literal["auto", "nearest", "gptq", "adaround"]
Rows = Literal["auto", "on", "off"]
Equalisation = Literal["auto", "on", "off"]
Effort = Literal["fast", "normal", "max"]
Calibration = Literal["auto", "clean", "adversarial", "mixed"]
Dialect = Literal["folding", "qdq"]
Sensitivity = Literal["auto", "error", "weighted", "noise", "divergence", "clean-divergence"]

_WORDS: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "thresholds": get_args(ThresholdForm),
    "bias_correction": get_args(BiasCorrection),
    "rounding": get_args(Rounding),
    "equalisation": get_args(Equalisation),
    "rows": get_args(Rows),
    "effort": get_args(Effort),
    "calibration": get_args(Calibration),
    "dialect": get_args(Dialect),
    "sensitivity": get_args(Sensitivity),
}


def parse_baseline(text: str) -> tuple[WeightSpec, ActivationSpec]:
    """Read ``WEIGHTS`` or ``WEIGHTS@ACTIVATIONS``; activations default to int8. Raises PlanError."""
    weights, _, activations = text.partition("@")
    return WeightSpec.parse(weights), ActivationSpec.parse(activations or "int8")


def parse_activations(text: str) -> tuple[ActivationSpec, ...]:
    """Read ``int8`` or ``int8,int6,int4:mse``, each once. Raises PlanError."""
    specs = tuple(ActivationSpec.parse(part) for part in text.split(","))
    if len(specs) > 1 and any(spec.is_float for spec in specs):
        raise PlanError("float is no width to choose", got=repr(text), fix="name it alone, or leave it out")
    return tuple(dict.fromkeys(specs))


@final
@dataclass(frozen=True)
class Options:
    """What `qopt optimize` may be told.

    Attributes:
        target: one or more target names, joined by commas.
        robust: thresholds filter, sensitivities are measured on adversarial examples, the attacks run and the gates
            of robustness apply.
        search: a name in the group `qopt.searches`.
        sensitivity: what a search sums up over layers: ``error``, ``(||dW|| / ||W||)^2``; ``weighted``, the same on the
            layer's inputs, ``||dW C^(1/2)||``; ``noise``, ``error`` times how far an attack moves the layer (QUANOS);
            ``divergence``, what the layer alone does to the predictions on images as hard as float withstands them
            (clean ones without ``robust``); ``clean-divergence``. ``auto`` is ``divergence`` with data, else ``error``.
        limits: limits beside those of the target.
        gates: conditions on the emitted file; None for the defaults (three with ``robust``, else none).
        norm: of the threat model.
        eps: its radius, pixels in [0, 1]; None for the default of the number of channels.
        thresholds: form of the Lipschitz thresholds; ``auto`` is ``weighted`` with data, else ``paper``.
        threshold: the bound of ``relative`` and ``weighted``.
        activations: formats of activations in place of the target's, joined by commas, or None: the first is what
            tensors have, the others what a tensor may have where a limit prices it.
        baselines: plans to measure beside the chosen one, ``WEIGHTS`` or ``WEIGHTS@ACTIVATIONS`` (``int4:max``,
            ``int8@int4``), uniform and rounded to nearest; activations default to int8.
        rounding: how weights become codes: ``nearest``, ``gptq``, ``adaround``, or ``auto``, which measures on the
            select images.
        bias_correction: ``auto`` chooses by measurement on the select images.
        equalisation: whether the ranges of channels are evened out between layers first (cross-layer equalisation);
            ``auto`` measures it on the select images at effort ``max`` and leaves it at any other.
        rows: whether the output channels of one layer may have different formats; ``auto`` chooses by measurement on
            the select images, and leaves them one format where thresholds are asked for, which look at whole layers.
        effort: how much ``auto`` tries: ``fast`` rounds to nearest only, ``normal`` also by GPTQ, ``max`` also by GPTQ
            around the origin and by AdaRound, and a uniform plan and an equalised network beside the searched one.
        mean: per-channel mean, where normalisation lies outside the network; ``std`` likewise.
        calibration: what the network is calibrated on: ``clean`` images, ``adversarial`` ones that PGD makes of them on
            the float network within the threat model, or ``mixed``, which takes every second image adversarial;
            ``auto`` is mixed with ``robust``, else clean.
        calibration_images: images that ranges and moments are observed on, at most.
        probe_images: images on which sensitivities and plans are compared, at most.
        dialect: how the file writes weights down: ``folding``, the fewest bytes, which ONNX Runtime unpacks at load; or
            ``qdq``, plain initializers into DequantizeLinear, which other compilers read.
        memory: weights of matrix products with float activations stay packed at run time where they have 16 levels or
            fewer: `MatMulNBits` of ONNX Runtime, with ``accuracy_level=1``.
        attack_images: report images that are attacked, at most; clean accuracy is always on all.
        evaluations: different plans that a search which measures plans (``refit``, ``optuna``) measures, at most.
        seed: every random choice derives from it.
    """

    target: str = "int4"
    robust: bool = False
    search: str = "greedy"
    sensitivity: Sensitivity = "auto"
    limits: tuple[Limit, ...] = ()
    gates: tuple[Gate, ...] | None = None
    norm: Norm = "linf"
    eps: float | None = None
    thresholds: ThresholdForm = "auto"
    threshold: float = 0.25
    activations: str | None = None
    baselines: tuple[str, ...] = ("int4:max",)
    rounding: Rounding = "auto"
    bias_correction: BiasCorrection = "auto"
    equalisation: Equalisation = "auto"
    rows: Rows = "auto"
    effort: Effort = "normal"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    calibration: Calibration = "auto"
    dialect: Dialect = "folding"
    memory: bool = False
    calibration_images: int = 1024
    probe_images: int = 256
    attack_images: int = 1000
    evaluations: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration_images", "probe_images", "attack_images", "evaluations"):
            if getattr(self, name) < 1:
                raise UsageError(
                    "must be at least 1", where=f"--{name.replace('_', '-')}", got=str(getattr(self, name))
                )
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise UsageError("must be positive and finite", where="--threshold", got=str(self.threshold))
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise UsageError(
                    "unknown word", where=f"--{name.replace('_', '-')}", expected=", ".join(words),
                    got=repr(getattr(self, name)),
                )  # fmt: skip
        if self.memory and self.dialect != "folding":
            raise UsageError(
                "weights that stay packed at run time are no plain QDQ", where="--memory",
                got=f"--dialect {self.dialect}", fix="leave out one of the two",
            )  # fmt: skip
        try:
            where = "--baseline"
            for baseline in self.baselines:
                parse_baseline(baseline)
            where = "--activations"
            if self.activations is not None:
                parse_activations(self.activations)
        except PlanError as error:
            raise error.at(where) from error

    @property
    def calibrated_on(self) -> Calibration:
        """``calibration`` with ``auto`` resolved."""
        if self.calibration != "auto":
            return self.calibration
        return "mixed" if self.robust else "clean"

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


def resolve_options(
    *,
    limits: tuple[str, ...] = (),
    gates: tuple[str, ...] | None = None,
    eps: float | str | None = None,
    **fields: Any,
) -> Options:
    """Options from what users write: limits, gates and eps as text, the other fields of `Options` as they are.

    Raises:
        UsageError: an unknown field, or a value that does not parse.
    """
    for name in fields:
        if name not in Options.__dataclass_fields__:
            raise UsageError("unknown option", got=repr(name), fix=nearest(name, Options.__dataclass_fields__))
    radius = parse_eps(eps) if isinstance(eps, str) else eps
    options = Options(
        limits=tuple(parse_limit(text) for text in limits),
        gates=None if gates is None else tuple(parse_gate(text) for text in gates),
        eps=radius,
        **fields,
    )
    if radius is not None:
        check_declared(options.norm, radius)
    return options
