"""What a plugin gives is looked at in one place: an answer that breaks the contract is an error in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

from qopt.cache import Cache
from qopt.errors import PluginError, QoptError
from qopt.hardware.cost_model import WIDEST, Constant, CostModel, LayerDescription, Specs, Step, StepMemory
from qopt.hardware.quantities import ADDITIVE, WHOLE
from qopt.limits import QUANTITIES, Limit
from qopt.plugins import load
from qopt.spec import WeightSpec

GROUP = "qopt.cost_models"
MEMORY = ("weight_memory", "step_memory")

Answer = TypeVar("Answer")


@final
@dataclass(frozen=True)
class CheckedModel:
    """A cost model whose every answer is checked.

    Raises:
        PluginError: an answer that the contract forbids, or an exception, with the plugin, layer and format.
    """

    model: CostModel

    def __post_init__(self) -> None:
        where = f"{GROUP} {type(self.model).__name__}"
        for attribute in ("name", "prices", "totals", "constants", "capabilities", "layer_cost", "network_cost"):
            if not hasattr(self.model, attribute):
                raise PluginError("the cost model lacks what its contract asks for", where=where, got=f"no {attribute}")
        if not isinstance(self.name, str) or not self.name:
            raise PluginError("the cost model has no name", where=where, got=repr(self.name))
        _check_units(self._where("prices"), self.model.prices, ADDITIVE)
        _check_units(self._where("totals"), self.model.totals, WHOLE)
        given = [name for name in MEMORY if hasattr(self.model, name)]
        if given and (len(given) < len(MEMORY) or "sram" not in self.model.totals):
            raise PluginError(
                "memory at every step needs both methods and sram in totals", where=self._where("memory"),
                expected=" and ".join(MEMORY), got=", ".join((*given, *self.model.totals)),
            )  # fmt: skip
        constants = self.model.constants
        if not isinstance(constants, Mapping) or not all(isinstance(one, Constant) for one in constants.values()):
            raise PluginError("constants are no mapping to Constant", where=self._where("constants"))

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def prices(self) -> Mapping[str, str]:
        """The model's additive quantities to their units."""
        return self.model.prices

    @property
    def totals(self) -> Mapping[str, str]:
        """The model's quantities of a whole plan to their units."""
        return self.model.totals

    @property
    def constants(self) -> Mapping[str, Constant]:
        """What the model computes with."""
        return self.model.constants

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """The widths of activation codes that the model prices differently, widest first; 8 where it says nothing."""
        found = getattr(self.model, "activation_bits", (WIDEST,))
        good = isinstance(found, Sequence) and all(isinstance(bits, int) and 1 <= bits <= WIDEST for bits in found)
        if not (good and found and list(found) == sorted(set(found), reverse=True)):
            raise PluginError(
                "not the widths of activations", where=self._where("activation_bits"),
                expected=f"whole numbers of 1 to {WIDEST}, widest first, each once", got=_short(found),
            )  # fmt: skip
        return tuple(found)

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """As the model has it; some of ``formats``."""
        where = self._where(layer.name)
        found = _asked(where, lambda: self.model.capabilities(layer, formats))
        if not isinstance(found, Sequence) or not all(spec in formats for spec in found):
            raise PluginError(
                "capabilities are not among the formats it was asked about", where=where,
                expected="some of " + ", ".join(map(str, formats)), got=_short(found),
            )  # fmt: skip
        return tuple(found)

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> dict[str, float]:
        """As the model has it; every quantity of `prices`, finite and not negative."""
        where = self._where(f"{layer.name} in {spec}")
        return _costs(where, _asked(where, lambda: self.model.layer_cost(layer, spec)), self.model.prices)

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> dict[str, float]:
        """As the model has it; every quantity of `totals`, finite and not negative."""
        where = self._where("the whole network")
        return _costs(where, _asked(where, lambda: self.model.network_cost(layers, specs, steps)), self.model.totals)

    @property
    def knows_memory(self) -> bool:
        """Whether the model says what weights take of memory at every step."""
        return hasattr(self.model, MEMORY[0])

    def weight_memory(self, layer: LayerDescription, spec: WeightSpec) -> float:
        """As the model has it; finite and not negative, 0 of a model that does not know."""
        if not self.knows_memory:
            return 0.0
        where, ask = self._where(f"{layer.name} in {spec}"), getattr(self.model, MEMORY[0])
        return _number(where, "weight_memory", _asked(where, lambda: ask(layer, spec)))

    def step_memory(self, layers: Sequence[LayerDescription], steps: Sequence[Step]) -> tuple[StepMemory, ...]:
        """As the model has it, over layers that there are; empty of a model that does not know."""
        if not self.knows_memory:
            return ()
        where, ask = self._where(MEMORY[1]), getattr(self.model, MEMORY[1])
        found = _asked(where, lambda: ask(layers, steps))
        if not isinstance(found, Sequence) or not all(isinstance(one, StepMemory) for one in found):
            raise PluginError("memory is no sequence of StepMemory", where=where, got=_short(found))
        known = {layer.name for layer in layers}
        for one in found:
            _number(f"{where}, {one.place}", "base", one.base)
            unknown = [name for name in one.layers if name not in known]
            if unknown or len(set(one.layers)) < len(one.layers):
                got = f"{unknown[0]!r}" if unknown else "a layer twice"
                raise PluginError(
                    "a step names layers that are not its network's", where=f"{where}, {one.place}", got=got
                )
        return tuple(found)

    def limits(self) -> tuple[Limit, ...]:
        """As the model has it."""
        where = self._where("limits")
        found = _asked(where, self.model.limits)
        if not isinstance(found, Sequence) or not all(_is_limit(one) for one in found):
            raise PluginError("limits are no tuple of Limit", where=where, got=_short(found))
        return tuple(found)

    def calibrated(self, cache: Cache, progress: Callable[[str], None]) -> CheckedModel:
        """The model with its constants measured on this machine, where it has a `calibrate`; else as it is."""
        calibrate = getattr(self.model, "calibrate", None)
        if calibrate is None:
            return self
        progress(f"calibrate {self.name}")
        return CheckedModel(_asked(self._where("calibrate"), lambda: calibrate(cache)))

    def _where(self, what: str) -> str:
        return f"cost model {self.name}, {what}"


def load_model(name: str) -> CheckedModel:
    """The cost model called ``name``, held to its contract.

    Raises:
        UsageError: there is none.
        PluginError: it does not load, cannot be built, or breaks its contract.
    """
    plugin: Callable[[], CostModel] = load(GROUP, name, "--target")
    model = CheckedModel(_asked(f"{GROUP} {name}", plugin))
    if model.name != name:
        raise PluginError("a cost model under another name than its own", where=f"{GROUP} {name}", got=model.name)
    return model


def _asked(where: str, ask: Callable[[], Answer]) -> Answer:
    """What somebody else's code answers."""
    try:
        return ask()
    except QoptError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError("the plugin failed", where=where, got=f"{type(error).__name__}: {error}") from error


def _check_units(where: str, declared: Any, known: Mapping[str, str]) -> None:
    if not isinstance(declared, Mapping):
        raise PluginError("quantities are no mapping to units", where=where, got=_short(declared))
    for quantity, unit in declared.items():
        if quantity not in known:
            raise PluginError("unknown quantity", where=where, expected=", ".join(known), got=repr(quantity))
        if unit != known[quantity]:
            raise PluginError(f"{quantity} in the wrong unit", where=where, expected=known[quantity], got=_short(unit))


def _costs(where: str, found: Any, declared: Mapping[str, str]) -> dict[str, float]:
    if not isinstance(found, Mapping) or set(found) != set(declared):
        got = ", ".join(map(str, found)) if isinstance(found, Mapping) else _short(found)
        raise PluginError(
            "costs are not those that it declares", where=where, expected=", ".join(declared), got=got or "nothing"
        )
    return {quantity: _number(where, quantity, found[quantity]) for quantity in declared}


def _number(where: str, quantity: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise PluginError(
            f"{quantity} is no cost", where=where, expected="a finite number, at least 0", got=_short(value)
        )
    return number


def _is_limit(one: Any) -> bool:
    return isinstance(one, Limit) and one.quantity in QUANTITIES


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
