"""Targets: what each name stands for, spelled out, and what two of them leave."""

from __future__ import annotations

import pytest

from qopt.errors import UsageError
from qopt.hardware.checked import load_model
from qopt.hardware.targets import PROBE, TARGETS, device, parse_target
from qopt.limits import Limit
from qopt.plugins import BUILT_IN, plugins
from qopt.spec import WeightSpec

MIXED = "ternary, int2, int3, int4, int4:max, log4, log4:max, int8"
SEVEN = MIXED.replace("int8", "int7")
MEMORY = "flash<=2097152, sram<=393216"
EXPANSIONS = {
    "int8": "int8: weights int8; activations int8; bits<=8",
    "int4": f"int4: weights {MIXED}; activations int8; bits<=4",
    "int4-uniform": "int4-uniform: weights int4; activations int8; bits<=4",
    "int2": f"int2: weights {MIXED}; activations int8; bits<=2",
    "int4,int4": f"int4,int4: weights {MIXED}; activations int8; bits<=4",
    "int4,int2": f"int4,int2: weights {MIXED}; activations int8; bits<=4, bits<=2",
    "int4,int8": "int4,int8: weights int8; activations int8; bits<=4, bits<=8",
    " int4 , int4-uniform ": "int4,int4-uniform: weights int4; activations int8; bits<=4",
    "bits": f"bits: weights {MIXED}; activations int8; no limits",
    "stm32f4": f"stm32f4: weights {MIXED}; activations int8; {MEMORY}; priced by stm32f4",
    "stm32f4,int4": f"stm32f4,int4: weights {MIXED}; activations int8; {MEMORY}, bits<=4; priced by stm32f4",
    "int4,bops,energy-45nm": f"int4,bops,energy-45nm: weights {MIXED}; activations int8 or fewer bits (7, 6, 5, 4, 3, "
    "2); bits<=4; priced by bops, energy-45nm",
    "bops,fpga-dsp48e2": f"bops,fpga-dsp48e2: weights {MIXED}; activations int8 or fewer bits (4); no limits; priced "
    "by bops, fpga-dsp48e2",
    "bops,stm32f4": f"bops,stm32f4: weights {MIXED}; activations int8; {MEMORY}; priced by bops, stm32f4",
    "x86-avx2": f"x86-avx2: weights {SEVEN}; activations int8; no limits; priced by x86-avx2",
    "x86-avx2,int8": "x86-avx2,int8: weights int7; activations int8; bits<=8; priced by x86-avx2",
    "int8,x86-avx2": "int8,x86-avx2: weights int7; activations int8; bits<=8; priced by x86-avx2",
    "int4,x86-avx2": f"int4,x86-avx2: weights {SEVEN}; activations int8; bits<=4; priced by x86-avx2",
    "measured:host": f"measured:host: weights {MIXED}; activations int8; no limits; priced by measured:host",
}


@pytest.mark.parametrize(("text", "expansion"), EXPANSIONS.items())
def test_expansions(text: str, expansion: str) -> None:
    assert parse_target(text).expansion == expansion


def test_every_precision_is_in_the_table() -> None:
    assert set(TARGETS) == {text for text in EXPANSIONS if "," not in text and text not in plugins("qopt.cost_models")}
    assert all(target.name == name for name, target in TARGETS.items())
    assert not set(TARGETS) & set(BUILT_IN["qopt.cost_models"])


@pytest.mark.parametrize("name", BUILT_IN["qopt.cost_models"])
def test_every_cost_model_is_a_target(name: str) -> None:
    target, model = parse_target(name), load_model(name)
    assert target == device(name)
    assert set(target.cost_models) == {"bits", name}
    assert target.cost_models[0] == "bits"
    assert target.limits == model.limits()
    assert model.capabilities(PROBE, target.weights) == target.weights
    assert {"int4", "ternary", "log4"} <= set(map(str, target.weights))
    assert len({WeightSpec.parse("int7"), WeightSpec.parse("int8")} & set(target.weights)) == 1


WRONG = [
    ("int3", ["--target: unknown target (got 'int3')", "did you mean 'int"]),
    ("stm32", ["unknown target", "did you mean 'stm32f4'?; `qopt targets` lists all"]),
    ("", ["unknown target (got '')"]),
    ("int4,", ["unknown target (got '')"]),
    ("int4 int8", ["unknown target"]),
    ("INT4", ["unknown target"]),
    ("int8,int4-uniform", ["--target: the targets have no weight format in common (got int8,int4-uniform)"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_other_names_are_no_targets(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert [word for word in words if word not in str(caught.value)] == []


def test_an_intersection_does_not_depend_on_the_order() -> None:
    names = [*TARGETS, "x86-avx2", "stm32f4", "bops"]
    for one in names:
        for other in names:
            if {one, other} == {"int8", "int4-uniform"}:
                continue
            first, second = parse_target(f"{one},{other}"), parse_target(f"{other},{one}")
            assert set(first.weights) == set(second.weights)
            assert set(first.limits) == set(second.limits)
            assert set(first.cost_models) == set(second.cost_models)
            assert first.activations == second.activations


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_can_keep_its_own_limits_and_is_priced(name: str) -> None:
    target = TARGETS[name]
    assert target.limits == (Limit("bits", target.limits[0].bound),)
    assert min(spec.container_bits for spec in target.weights) <= target.limits[0].bound
    assert set(target.cost_models) <= set(plugins("qopt.cost_models"))
