"""Named suites of attacks for a declared threat model: `quick`, `papers` and `standard`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final, cast, final

from torch import Tensor

from qopt.attacks import (
    BIM,
    CW,
    FGSM,
    MIM,
    PGD,
    RFGSM,
    SPSA,
    ZOO,
    Attack,
    AttackResult,
    Budget,
    Classifier,
    GaussianNoise,
    MinimumAttack,
    Square,
    UniformNoise,
    standard,
)
from qopt.errors import UsageError, nearest
from qopt.measure.robustness import BATCH
from qopt.threat import ThreatModel

QUERIES: Final = (GaussianNoise, UniformNoise, SPSA, Square, ZOO)
"""Attacks that ask for outputs only: they are made on the file itself."""

DECLARED: Final = "declared threat model"


@final
@dataclass(frozen=True)
class Unbounded:
    """A minimum attack where an `Attack` is called for: the threat model is not looked at."""

    attack: MinimumAttack

    @property
    def name(self) -> str:
        """The name of the attack."""
        return self.attack.name

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Tensor | None = None,
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1], whatever the distortion."""
        return self.attack(model, images, labels, seed=seed, indices=indices)


@final
@dataclass(frozen=True)
class Entry:
    """One attack of a suite.

    Attributes:
        attack: the attack; a minimum attack as `Unbounded`, or as `qopt.attacks.Within`.
        threat: what it is bounded by; None for what has no bound (`Unbounded`).
        origin: who set the parameters, and for what.
    """

    attack: Attack
    threat: ThreatModel | None
    origin: str = DECLARED

    @property
    def queries(self) -> bool:
        """Whether it only asks for outputs."""
        return isinstance(getattr(self.attack, "attack", self.attack), QUERIES)

    def counts_for(self, declared: ThreatModel) -> bool:
        """Whether all its examples lie in the ball of ``declared``; those of an unbounded one do where they do."""
        return self.threat is not None and self.threat.norm == declared.norm and self.threat.eps <= declared.eps

    def within(self, eps: float) -> Entry:
        """The same with another eps; what has no bound stays as it is."""
        return self if self.threat is None else replace(self, threat=replace(self.threat, eps=eps))


@final
@dataclass(frozen=True)
class Preset:
    """A suite of attacks.

    Attributes:
        name: its name.
        entries: the attacks.
        transfers: attacks by gradients whose examples are made on other models.
        blind: attacks by queries that stand in for those by gradients on a model that has none.
        in_turn: every attack is run on what those before it left, as in AutoAttack; otherwise each on all images.
        budget: what the masking checks may cost.

    Raises:
        UsageError: there is no attack; one that needs no gradients is to transfer, or one that does is blind.
    """

    name: str
    entries: tuple[Entry, ...]
    transfers: tuple[Entry, ...] = ()
    blind: tuple[Entry, ...] = ()
    in_turn: bool = False
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if not self.entries:
            raise UsageError("a preset needs attacks", where=f"preset {self.name}")
        for entries, queries in ((self.transfers, True), (self.blind, False)):
            for entry in entries:
                if entry.queries is queries:
                    what = "only attacks by gradients transfer" if queries else "blind attacks only ask for outputs"
                    raise UsageError(what, where=f"preset {self.name}", got=entry.attack.name)

    def batched(self, batch_size: int | None) -> Preset:
        """The same with ``batch_size`` images, or evaluations, per forward pass; None leaves every attack its own."""
        if batch_size is None:
            return self
        entries, transfers, blind = (
            tuple(replace(entry, attack=changed(entry.attack, batch_size=batch_size)) for entry in part)
            for part in (self.entries, self.transfers, self.blind)
        )
        return replace(self, entries=entries, transfers=transfers, blind=blind)

    def against(self, *, gradients: bool) -> tuple[Entry, ...]:
        """What attacks a model that has gradients, or one that has none."""
        if gradients:
            return self.entries
        return merged([*(entry for entry in self.entries if entry.queries), *self.blind])


def merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Attacks that occur several times in one threat model, once, with all their origins."""
    found: dict[tuple[Attack, ThreatModel | None], list[str]] = {}
    for entry in entries:
        origins = found.setdefault((entry.attack, entry.threat), [])
        origins += [] if entry.origin in origins else [entry.origin]
    return tuple(Entry(attack, threat, "; ".join(origins)) for (attack, threat), origins in found.items())


def changed(attack: Attack, **options: Any) -> Attack:
    """``attack`` with those of ``options`` that it has; of a wrapped one, with those of the attack inside."""
    inner = getattr(attack, "attack", None)
    if inner is not None:
        return cast("Attack", replace(cast("Any", attack), attack=changed(inner, **options)))
    names = {option.name for option in fields(cast("Any", attack))}
    return cast("Attack", replace(cast("Any", attack), **{n: v for n, v in options.items() if n in names}))


def preset(name: str, threat: ThreatModel, channels: int = 3) -> Preset:
    """The preset ``name``, one of `PRESETS`, against ``threat``, for images of so many ``channels``.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError("unknown preset", where="--preset", got=repr(name), fix=nearest(name, PRESETS))
    return {"quick": _quick, "papers": _papers, "standard": _standard}[name](threat, channels)


PRESETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "quick": "FGSM, PGD-20 and PGD-20 on the margin with three restarts",
        "papers": "the attacks of three papers with their parameters, and those of quick",
        "standard": "AutoAttack: APGD-CE, APGD-T, FAB-T and Square",
    }
)
"""Name to what it holds."""


def _quick(threat: ThreatModel, channels: int) -> Preset:
    attacks = (FGSM(batch_size=BATCH), PGD(batch_size=BATCH), PGD(loss="margin", restarts=3, batch_size=BATCH))
    budget = Budget(images=100, queried_images=20)
    entries = tuple(Entry(attack, threat) for attack in attacks)
    return Preset("quick", entries, _transfers(threat), (Entry(Square(queries=1000), threat),), budget=budget)


def _standard(threat: ThreatModel, channels: int) -> Preset:
    attacks = standard(threat, BATCH)
    origin = "Croce and Hein 2020, AutoAttack"
    entries = tuple(Entry(changed(a, batch_size=128) if isinstance(a, Square) else a, threat, origin) for a in attacks)
    return Preset("standard", entries, _transfers(threat), in_turn=True)


def _transfers(threat: ThreatModel) -> tuple[Entry, ...]:
    attacks = (PGD(compact=False, batch_size=BATCH), MIM(compact=False, batch_size=BATCH))
    return tuple(Entry(attack, threat) for attack in attacks)


def _papers(threat: ThreatModel, channels: int) -> Preset:
    declared = [Entry(changed(entry.attack, compact=False), threat) for entry in _quick(threat, channels).entries]
    white, gray = _layerwise(channels)
    others = [*declared, *_defensive(), *_low_bitwidth()]
    transfers = (entry for entry in [*others, *gray] if not entry.queries)
    return Preset("papers", merged([*declared, *white, *others]), merged(transfers), (Entry(Square(), threat),))


def _layerwise(channels: int) -> tuple[list[Entry], list[Entry]]:
    """Song, Ranjan, Li 2021: white box, and with a larger eps for iterative attacks, gray box.

    The paper leaves the eps values open. What is read here for colour images is CIFAR-10's, for grey ones MNIST's.
    """
    weak, strong = (_linf(0.1), _linf(0.3)) if channels == 1 else (_linf(2 / 255), _linf(8 / 255))
    paper = "Song et al. 2021, section 6"
    steps = [kind(compact=False, batch_size=BATCH) for kind in (PGD, BIM, MIM)]
    both = [
        Entry(Unbounded(GaussianNoise(strong.eps)), None, f"{paper}, Gaussian"),
        Entry(UniformNoise(), strong, f"{paper}, Random"),
        Entry(FGSM(batch_size=BATCH), weak, f"{paper}, FGSM weak"),
        Entry(FGSM(batch_size=BATCH), strong, f"{paper}, FGSM strong"),
        Entry(Unbounded(_cw()), None, f"{paper}, CW-L2"),
    ]
    white, gray = ([*both, *(Entry(attack, eps, paper) for attack in steps)] for eps in (weak, strong))
    return white, gray


def _defensive() -> list[Entry]:
    """Lin, Gan, Han 2019: linf 2, 8 and 16 of 255, steps and their number as Kurakin et al. have them."""
    paper = "Lin et al. 2019, section 2.2.1"
    found = []
    for pixels in (2, 8, 16):
        threat = _linf(pixels / 255)
        bim = changed(BIM.kurakin(threat.eps), compact=False, batch_size=BATCH)
        assert isinstance(bim, BIM)
        pgd = PGD(steps=bim.steps, step=bim.step, compact=False, batch_size=BATCH)
        noise, single = UniformNoise(), (FGSM(batch_size=BATCH), RFGSM(batch_size=BATCH))
        found += [Entry(attack, threat, paper) for attack in (noise, *single, bim, pgd)]
    return found


def _low_bitwidth() -> list[Entry]:
    """Bernhard, Moellic, Dutertre 2019, appendix B: linf 0.03."""
    paper = "Bernhard et al. 2019, appendix B"
    threat = _linf(0.03)
    bounded: tuple[Attack, ...] = (
        FGSM(batch_size=BATCH), BIM(steps=100, step=0.0003, compact=False, batch_size=BATCH), SPSA(learning_rate=0.01),
    )  # fmt: skip
    return [
        *(Entry(attack, threat, paper) for attack in bounded),
        Entry(Unbounded(_cw()), None, paper),
        Entry(Unbounded(ZOO()), None, paper),
    ]


def _cw() -> CW:
    """CW-L2 as Bernhard et al. have it, which serves for Song et al. too."""
    return replace(CW.low_bitwidth(), batch_size=BATCH)


def _linf(eps: float) -> ThreatModel:
    return ThreatModel("linf", eps)
