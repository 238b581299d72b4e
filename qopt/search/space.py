"""What a search chooses from and what it returns: layers, their candidate formats with facts, limits, an outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, final

from qopt.errors import PlanError, UsageError, nearest
from qopt.limits import Limit
from qopt.lipschitz import NormBound
from qopt.search.potentials import Potentials
from qopt.size import Stored, stored_bytes
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class Candidate:
    """One format for one layer, with what it costs and what it does to the weight.

    Attributes:
        spec: the format.
        code_bits: container bits of the codes, summed over the weight.
        bytes: bytes of codes and scales.
        norm: ``||W_q||_2`` of the reshaped matrix.
        error: ``||W - W_q||_2`` of the reshaped matrix.
        row_error: ``||W - W_q||_inf``, the largest 1-norm of a row.
        weighted: ``||dW C^(1/2)||_2 / ||W C^(1/2)||_2`` with C the second moment of the layer's inputs; None
            without data.
        sensitivity: what choosing it costs the network, in the unit of the search; smaller is better.
        operator: the l2 operator norm of what the layer computes with ``W_q``; None where no limit asks for it.
        costs: what else it costs, by column: ``QUANTITY on MODEL`` in the units of `qopt.limits`.
    """

    spec: WeightSpec
    code_bits: float
    bytes: int
    norm: NormBound
    error: NormBound
    row_error: NormBound
    weighted: NormBound | None = None
    sensitivity: float = 0.0
    operator: NormBound | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class LayerSpace:
    """One layer: its number of weights, the norms of its float weight and its candidates."""

    layer: str
    weights: int
    norm: NormBound
    row_norm: NormBound
    candidates: tuple[Candidate, ...]

    def candidate(self, spec: WeightSpec) -> Candidate:
        """The candidate of format ``spec``; KeyError where there is none."""
        for candidate in self.candidates:
            if candidate.spec == spec:
                return candidate
        raise KeyError(str(spec))


@final
@dataclass(frozen=True)
class Moment:
    """What is taken at once at one step of the network's execution, of a quantity that is no sum over all layers.

    Attributes:
        place: the step's name, as users know it.
        column: ``QUANTITY on MODEL``; of `Candidate.costs`, what a format takes while it counts.
        base: what the step takes whatever the formats are: live activations.
        layers: those whose formats count at this step: at most all.
    """

    place: str
    column: str
    base: float = 0.0
    layers: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Row:
    """One linear limit: the costs in ``column``, summed over ``layers`` (None: all), are at most ``room``.

    ``place`` is the step at which it holds, empty for a sum over the network; ``base`` is what is spent beside the
    layers, so that ``base + room`` is the limit's bound.
    """

    limit: Limit
    column: str
    room: float
    base: float = 0.0
    layers: frozenset[str] | None = None
    place: str = ""

    def counts(self, layer: str) -> bool:
        """Whether the layer's format spends of it."""
        return self.layers is None or layer in self.layers


@final
@dataclass(frozen=True)
class Space:
    """All layers, the limits a plan must keep and the groups of layers that must share a format.

    ``potentials`` say how the network's Lipschitz constant follows from its layers, where a limit asks for it.
    ``fixed`` is what a plan spends of a column whatever its formats: steps without weights, the program itself.
    ``moments`` are the steps at which a limit on memory at once holds.

    Raises:
        PlanError: a tie names an unknown layer, or one that is in another tie; the potentials or a moment name an
            unknown layer.
    """

    layers: tuple[LayerSpace, ...]
    limits: tuple[Limit, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    potentials: Potentials | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)
    moments: tuple[Moment, ...] = ()

    def __post_init__(self) -> None:
        known = [layer.layer for layer in self.layers]
        for name in () if self.potentials is None else self.potentials.layers:
            if name not in known:
                raise PlanError("the potentials name an unknown layer", where=name, fix=nearest(name, known))
        for name in {name for moment in self.moments for name in moment.layers}.difference(known):
            raise PlanError("a step of the execution names an unknown layer", where=name, fix=nearest(name, known))
        tied = [name for group in self.ties for name in group]
        for name in tied:
            if name not in known:
                raise PlanError("a tie names an unknown layer", where=name, fix=nearest(name, known))
            if tied.count(name) > 1:
                raise PlanError("a layer is tied twice", where=name, fix="join its ties to one")

    @property
    def weights(self) -> int:
        """Number of weights in the network."""
        return sum(layer.weights for layer in self.layers)

    @property
    def lipschitz(self) -> float | None:
        """The tightest limit on the network's Lipschitz constant in l2; None without one."""
        return min((limit.bound for limit in self.limits if limit.quantity == "lipschitz"), default=None)

    @property
    def additive(self) -> tuple[Limit, ...]:
        """The limits on sums over layers: all but those on the Lipschitz constant and on memory at once."""
        return tuple(limit for limit in self.limits if limit.quantity not in ("lipschitz", "sram"))

    def budgets(self) -> tuple[tuple[str, float], ...]:
        """Every limit on a sum over all layers as (column of `costs`, the most that may be spent), see `rows`."""
        return tuple((row.column, row.room) for row in self.rows() if row.layers is None)

    def rows(self) -> tuple[Row, ...]:
        """Every limit but the Lipschitz one as rows: a column that it bounds, or a step at which it does.

        A limit bounds its quantity on every cost model that prices it. Limits in bytes of the file set aside the tables
        of all candidate formats, whether or not a plan uses them: which tables the file needs is no sum over layers,
        and a plan must never exceed its limit.

        Raises:
            UsageError: a limit on something that no cost model of this run prices.
        """
        unpriced = [limit for limit in self.limits if limit.quantity == "lipschitz" and self.potentials is None]
        sums = [self._sum(limit, column) for limit in (*unpriced, *self.additive) for column in _columns(limit, self)]
        return (*sums, *(self._at(limit, one) for limit in self.limits for one in self.moments if _bounds(limit, one)))

    def _sum(self, limit: Limit, column: str) -> Row:
        if column == "code_bits":
            return Row(limit, column, limit.bound * self.weights)
        return Row(limit, column, limit.bound - self.beside(column), self.beside(column))

    def _at(self, limit: Limit, moment: Moment) -> Row:
        room = limit.bound - moment.base
        return Row(limit, moment.column, room, moment.base, frozenset(moment.layers), moment.place)

    def beside(self, column: str) -> float:
        """What of a column's limit is spent beside the layers."""
        return float(self.table_bytes) if column == "bytes" else self.fixed.get(column, 0.0)

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of all candidate formats; a file holds each table once."""
        empty = [Stored(0, 0, candidate.spec) for layer in self.layers for candidate in layer.candidates]
        return stored_bytes(empty) - sum(tensor.bytes for tensor in empty)


def costs(candidate: Candidate) -> Mapping[str, float]:
    """The additive costs of a candidate by column."""
    return {"code_bits": candidate.code_bits, "bytes": float(candidate.bytes), **candidate.costs}


def column_of(quantity: str, model: str) -> str:
    """The column of what a cost model asks for; those of storage, which every target prices, have plain names."""
    return quantity if quantity in ("code_bits", "bytes") and model == "bits" else f"{quantity} on {model}"


@final
@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        specs: layer to format.
        reasons: layer to why it got it.
        notes: what the user should know, one sentence each.
        gap: how far the objective can be from the optimum, as a share of it; None where nothing is known.
    """

    specs: dict[str, WeightSpec]
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gap: float | None = None


class Strategy(Protocol):
    """A search. Implementations are frozen dataclasses whose fields are their options; the group is `qopt.searches`.

    Attributes:
        name: the word for it on the command line.
        uses_sensitivity: whether candidates must carry a sensitivity and pass the thresholds before the search.
    """

    name: ClassVar[str]
    uses_sensitivity: ClassVar[bool]

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """The formats it wants facts for, given those of the target."""
        ...

    def __call__(self, space: Space) -> Outcome:
        """Choose a format for every layer."""
        ...


def _bounds(limit: Limit, moment: Moment) -> bool:
    return limit.quantity == "sram" and moment.column.startswith("sram on ")


def _columns(limit: Limit, space: Space) -> tuple[str, ...]:
    """The columns that a limit bounds; program memory is the file's bytes where no device prices it."""
    if limit.quantity == "bits":
        return ("code_bits",)
    if limit.quantity == "size":
        return ("bytes",)
    columns = {column for layer in space.layers for candidate in layer.candidates for column in candidate.costs}
    priced = tuple(sorted(column for column in columns if column.startswith(f"{limit.quantity} on ")))
    if priced or limit.quantity == "flash":
        return priced or ("bytes",)
    raise UsageError(
        f"no cost model of this target prices {limit.quantity}", where="--limit", got=str(limit),
        fix="limits on bits, size and flash are priced by every target; `qopt targets` lists what prices others",
    )  # fmt: skip
