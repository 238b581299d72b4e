"""Cost models that break their contract are named in one line, wherever they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from qopt.cache import Cache
from qopt.errors import PluginError, UsageError
from qopt.hardware.checked import CheckedModel, load_model
from qopt.hardware.cost_model import Constant, CostModel, LayerDescription, Step, StepMemory
from qopt.hardware.quantities import ADDITIVE, WHOLE, units
from qopt.limits import QUANTITIES, Limit
from qopt.plugins import plugins
from qopt.spec import WeightSpec

INT4, INT8 = WeightSpec.parse("int4"), WeightSpec.parse("int8")


@dataclass(frozen=True)
class Device:
    """A model that answers what it is told to, functions by calling them."""

    cost: Any = 1.0
    taken: Any = None
    whole: Any = 2.0
    limit: Any = ()
    prices: Any = None
    totals: Any = None
    constants: Any = None
    name: Any = "device"
    activation_bits: Any = (8,)

    def __post_init__(self) -> None:
        for field, value in {"prices": units("latency"), "totals": units("latency"), "constants": {}}.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

    def capabilities(self, layer: LayerDescription, formats: Any) -> Any:
        return tuple(formats) if self.taken is None else answer(self.taken)

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Any:
        found = answer(self.cost)
        return found if isinstance(found, Mapping | list) else {"latency": found}

    def network_cost(self, layers: Any, specs: Any, steps: Any = ()) -> Any:
        found = answer(self.whole)
        return found if isinstance(found, Mapping | list) else {"latency": found}

    def limits(self) -> Any:
        return answer(self.limit)


def answer(value: Any) -> Any:
    return value() if callable(value) else value


def fails(error: BaseException) -> Callable[[], Any]:
    def raising() -> Any:
        raise error

    return raising


NO_COSTS = [
    (fails(ValueError("planted\nsecond line")), "the plugin failed (got ValueError: planted second line)"),
    (fails(ZeroDivisionError()), "the plugin failed (got ZeroDivisionError: )"),
    (fails(SystemExit("bye")), "the plugin failed (got SystemExit: bye)"),
    (float("nan"), "latency is no cost (expected a finite number, at least 0, got nan)"),
    (float("inf"), "latency is no cost"),
    (-1e-12, "latency is no cost (expected a finite number, at least 0, got -1e-12)"),
    (np.float64("nan"), "latency is no cost"),
    ("5 ms", "latency is no cost (expected a finite number, at least 0, got '5 ms')"),
    ("5", "latency is no cost"),
    (True, "latency is no cost"),
    (None, "latency is no cost (expected a finite number, at least 0, got None)"),
    (1j, "latency is no cost"),
    (10**400, "latency is no cost"),
    ([1.0], "costs are not those that it declares (expected latency, got [1.0])"),
    ({}, "costs are not those that it declares (expected latency, got nothing)"),
    ({"latency": 1.0, "energy": 1.0}, "costs are not those that it declares (expected latency, got latency, energy)"),
    ({"latency_ms": 1.0}, "costs are not those that it declares (expected latency, got latency_ms)"),
    ({1: 1.0}, "costs are not those that it declares (expected latency, got 1)"),
]


@pytest.mark.parametrize(("cost", "said"), NO_COSTS, ids=lambda v: str(v)[:30])
def test_costs_that_are_none(conv: Callable[..., LayerDescription], cost: Any, said: str) -> None:
    alone, whole = CheckedModel(Device(cost=cost)), CheckedModel(Device(whole=cost))
    asked: dict[str, Callable[[], object]] = {
        "conv in int4": lambda: alone.layer_cost(conv(), INT4),
        "the whole network": lambda: whole.network_cost([conv()], {"conv": INT4}),
    }
    for place, ask in asked.items():
        with pytest.raises(PluginError) as caught:
            ask()
        message = str(caught.value)
        assert message.startswith(f"cost model device, {place}: {said}")
        assert "\n" not in message
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("cost", [0, 0.0, 1, 1e-9, np.float32(0.5), np.int64(3), Fraction(1, 4), Decimal("0.125")])
def test_numbers_of_any_kind_are_costs(conv: Callable[..., LayerDescription], cost: Any) -> None:
    found = CheckedModel(Device(cost=cost, whole=cost))
    assert found.layer_cost(conv(), INT4) == {"latency": float(cost)}
    assert found.network_cost([conv()], {"conv": INT4}) == {"latency": float(cost)}
    assert type(found.layer_cost(conv(), INT4)["latency"]) is float


NO_FORMATS = [
    ((INT8,), "capabilities are not among the formats it was asked about (expected some of int4, got"),
    ("int4", "capabilities are not among"),
    (7, "capabilities are not among the formats it was asked about (expected some of int4, got 7)"),
    (fails(KeyError("op")), "the plugin failed (got KeyError: 'op')"),
]


@pytest.mark.parametrize(("taken", "said"), NO_FORMATS, ids=lambda v: str(v)[:30])
def test_formats_that_nobody_asked_about(conv: Callable[..., LayerDescription], taken: Any, said: str) -> None:
    with pytest.raises(PluginError) as caught:
        CheckedModel(Device(taken=taken)).capabilities(conv(), (INT4,))
    assert str(caught.value).startswith(f"cost model device, conv: {said}")


def test_capabilities_may_be_empty_or_a_list(conv: Callable[..., LayerDescription]) -> None:
    assert CheckedModel(Device(taken=())).capabilities(conv(), (INT4,)) == ()
    assert CheckedModel(Device(taken=[INT4])).capabilities(conv(), (INT4, INT8)) == (INT4,)


WRONG_WORDS = [
    ({"prices": {"latency": "ms"}}, "device, prices: latency in the wrong unit (expected s, got 'ms')"),
    ({"prices": {"energy": "s"}}, "device, prices: energy in the wrong unit (expected J, got 's')"),
    ({"totals": {"sram": "KB"}}, "device, totals: sram in the wrong unit (expected B, got 'KB')"),
    ({"prices": {"sram": "B"}}, "device, prices: unknown quantity (expected code_bits, bytes, flash, latency"),
    ({"totals": {"area": "mm2"}}, "device, totals: unknown quantity"),
    ({"prices": ["latency"]}, "device, prices: quantities are no mapping to units (got ['latency'])"),
    ({"constants": {"clock": 5.0}}, "device, constants: constants are no mapping to Constant"),
    (
        {"activation_bits": 8},
        "device, activation_bits: not the widths of activations (expected whole numbers of 1 to 8",
    ),
    ({"activation_bits": ()}, "device, activation_bits: not the widths"),
    ({"activation_bits": (4, 8)}, "device, activation_bits: not the widths"),
    ({"activation_bits": (8, 8)}, "device, activation_bits: not the widths"),
    ({"activation_bits": (16, 8)}, "device, activation_bits: not the widths"),
    ({"activation_bits": (8, 0.5)}, "device, activation_bits: not the widths"),
    ({"constants": [1]}, "device, constants: constants are no mapping to Constant"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG_WORDS, ids=lambda v: str(v)[:40])
def test_wrong_declarations(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(PluginError) as caught:
        _ = CheckedModel(Device(**fields)).activation_bits
    assert str(caught.value).startswith(f"cost model {said}")


def test_widths_are_eight_bits_unless_said() -> None:
    assert CheckedModel(Device()).activation_bits == (8,)
    assert CheckedModel(Device(activation_bits=[8, 4])).activation_bits == (8, 4)


@pytest.mark.parametrize("name", [None, "", 3])
def test_a_model_has_a_name(name: Any) -> None:
    with pytest.raises(PluginError, match=r"qopt.cost_models Device: the cost model has no name"):
        CheckedModel(Device(name=name))


def test_what_is_no_model_at_all() -> None:
    with pytest.raises(PluginError, match=r"qopt.cost_models object: the cost model lacks .* \(got no name\)"):
        CheckedModel(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limit",
    [[Limit("flash", 1.0), "sram<=1"], "flash<=1", 3, Limit("flash", 1.0), [Limit("area", 1.0)]],  # type: ignore[arg-type]
)
def test_limits_that_are_none(limit: Any) -> None:
    with pytest.raises(PluginError, match=r"cost model device, limits: limits are no tuple of Limit"):
        CheckedModel(Device(limit=limit)).limits()


def test_an_error_of_qopt_passes_as_it_is(conv: Callable[..., LayerDescription]) -> None:
    planted = UsageError("not calibrated", where="device")
    with pytest.raises(UsageError) as caught:
        CheckedModel(Device(cost=fails(planted))).layer_cost(conv(), INT4)
    assert caught.value is planted


def test_an_interruption_is_no_failure_of_the_plugin(conv: Callable[..., LayerDescription]) -> None:
    with pytest.raises(KeyboardInterrupt):
        CheckedModel(Device(cost=fails(KeyboardInterrupt()))).layer_cost(conv(), INT4)


def test_right_answers_pass_through(conv: Callable[..., LayerDescription]) -> None:
    model = Device(limit=[Limit("flash", 7.0)], constants={"c": Constant(1, "s", "assumed", "nowhere")})
    checked = CheckedModel(model)
    assert (checked.name, checked.prices, checked.totals) == ("device", {"latency": "s"}, {"latency": "s"})
    assert checked.constants is model.constants
    assert checked.limits() == (Limit("flash", 7.0),)
    assert checked.capabilities(conv(), (INT4, INT8)) == (INT4, INT8)


def test_calibration_is_for_those_who_have_it() -> None:
    said: list[str] = []
    plain = CheckedModel(Device())
    assert plain.calibrated(Cache(None), said.append) is plain
    assert said == []

    class Measured(Device):
        def calibrate(self, cache: Cache) -> CostModel:
            return Device(cost=3.0)

    found = CheckedModel(Measured()).calibrated(Cache(None), said.append)
    assert found == CheckedModel(Device(cost=3.0))
    assert said == ["calibrate device"]

    class Broken(Device):
        def calibrate(self, cache: Cache) -> CostModel:
            raise OSError("no sensor")

    with pytest.raises(PluginError, match=r"device, calibrate: the plugin failed \(got OSError: no sensor"):
        CheckedModel(Broken()).calibrated(Cache(None), said.append)


def test_units_are_in_one_place() -> None:
    assert set(ADDITIVE) <= set(WHOLE)
    assert set(QUANTITIES) - set(WHOLE) == {"lipschitz"}
    assert units("latency", "sram") == {"latency": "s", "sram": "B"}
    with pytest.raises(KeyError):
        units("area")


@pytest.mark.parametrize("name", plugins("qopt.cost_models"))
def test_every_built_in_model_keeps_its_own_rules(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert isinstance(model.limits(), tuple)


def test_unknown_models_offer_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'stm32f4'"):
        load_model("stm32f5")


def test_a_step_is_what_a_solver_has_as_a_row() -> None:
    step = Step("n", "Add", "", 8, 4, 8, ())
    assert (step.bytes, step.moved_bytes) == (0, 12)


@dataclass(frozen=True)
class Scratchpad(Device):
    """A device whose weights lie beside its activations."""

    taken_memory: Any = 3.0
    rows: Any = (StepMemory("n", 1.0, ("l",)),)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "totals", units("latency", "sram") if self.totals == units("latency") else self.totals)

    def weight_memory(self, layer: LayerDescription, spec: WeightSpec) -> Any:
        return answer(self.taken_memory)

    def step_memory(self, layers: Any, steps: Any) -> Any:
        return answer(self.rows)


class Half(Device):
    def weight_memory(self, layer: LayerDescription, spec: WeightSpec) -> Any:
        return 1.0


MEMORY_LAYER = LayerDescription("l", "Conv", (8, 4, 3, 3), 8, 288, 288 * 64)


def test_memory_at_every_step_is_passed_on() -> None:
    model = CheckedModel(Scratchpad())
    assert model.knows_memory
    assert model.weight_memory(MEMORY_LAYER, INT4) == 3.0
    assert model.step_memory([MEMORY_LAYER], []) == (StepMemory("n", 1.0, ("l",)),)
    plain = CheckedModel(Device())
    assert (plain.knows_memory, plain.weight_memory(MEMORY_LAYER, INT4), plain.step_memory([], [])) == (False, 0.0, ())


@pytest.mark.parametrize("taken", [-1.0, float("nan"), float("inf"), None, "3", True])
def test_memory_of_a_weight_is_a_cost(taken: Any) -> None:
    with pytest.raises(PluginError, match=r"cost model device, l in int4: weight_memory is no cost"):
        CheckedModel(Scratchpad(taken_memory=taken)).weight_memory(MEMORY_LAYER, INT4)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "memory is no sequence of StepMemory"),
        ([1], "memory is no sequence of StepMemory"),
        ([StepMemory("n", -1.0)], "step_memory, n: base is no cost"),
        ([StepMemory("n", float("nan"))], "step_memory, n: base is no cost"),
        ([StepMemory("n", 0.0, ("m",))], "a step names layers that are not its network's .*'m'"),
        ([StepMemory("n", 0.0, ("l", "l"))], "a step names layers that are not its network's .*a layer twice"),
    ],
)
def test_memory_of_steps_is_checked(rows: Any, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        CheckedModel(Scratchpad(rows=rows)).step_memory([MEMORY_LAYER], [])


def test_memory_at_every_step_needs_both_methods_and_its_peak() -> None:
    for model in (Half(), Scratchpad(totals=units("energy"))):
        with pytest.raises(PluginError, match="memory at every step needs both methods and sram in totals"):
            CheckedModel(model)
