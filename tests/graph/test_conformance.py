"""Every operator that the importer claims, on the cases with which the `onnx` package tests runtimes.

A case is a graph, mostly of one node, with inputs of any number and type and the outputs that it must have. It is
imported as it is; where an operator needs constants, inputs become initializers.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from qopt.errors import UnsupportedModelError
from qopt.graph.fold_constants import lift_constants
from qopt.graph.names import name_everything
from qopt.graph.operators import TABLE, Call, carried
from qopt.graph.opset import OPSET, convert_opset
from qopt.graph.shapes import infer_shapes
from qopt.graph.twin import import_graph

Array = NDArray[Any]

REFUSED = {
    r"FLOAT8|FLOAT4|float8|float4|e4m3|e5m2|e8m0": "floats of 8 and 4 bits: torch only stores them, qopt writes none",
    r"test_equal_string": "text",
    r"test_identity_(sequence|opt)$": "values that are no tensors",
    r"test_training_dropout|test_batchnorm_.*_training_mode": "a network in training",
    r"test_bitshift_.*_uint64": "bits of uint64: torch's int64, which carries it, lacks the last",
    r"test_maxpool_with_argmax": "indices of MaxPool: no network that qopt has met unpools",
}
"""Cases by name that are refused, and what they are of."""

DIFFERENT = {
    r"test_resize_downsample_scales_(linear|cubic)_align_corners$":
        "ONNX aligns corners by the exact size of the result, ONNX Runtime, which the twin follows, by the rounded one",
}  # fmt: skip
"""Cases by name that are imported and give something else, and why."""

OLD_NAMES = {"Upsample": "Resize", "Scatter": "ScatterElements"}
"""Operators that the conversion to opset 21 replaces."""

WITHOUT_CASES = {
    "GlobalLpPool": "onnx generates none; tests/graph/test_twin_operators.py has one",
    "com.microsoft::MatMulNBits": "of ONNX Runtime's own domain; tests/emit/test_nbits.py compares it",
}

HALF = {ml_dtypes.bfloat16: 2**-6, np.float16: 2**-9}
"""Tolerance, absolute and relative, of types in which the order of additions shows: four units in the last place."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case: ``passed``, ``refused`` or what differs."""

    operators: frozenset[str]
    result: str


def _as_array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _loaded(proto: onnx.ModelProto, constants: dict[str, Array]) -> ir.Model:
    """A case's graph as `prepare` would leave it, some inputs made initializers."""
    model = ir.serde.deserialize_model(proto)
    graph = model.graph
    for value in [v for v in graph.inputs if v.name in constants]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(constants[str(value.name)], dtype=value.dtype, name=value.name)
        graph.initializers[str(value.name)] = value
    lift_constants(model)
    if model.opset_imports[""] < OPSET:
        model, _ = convert_opset(model)
        lift_constants(model)
    name_everything(model)
    infer_shapes(model)
    return model


def _imported(proto: onnx.ModelProto, inputs: dict[str, Any]) -> tuple[ir.Model, torch.fx.GraphModule]:
    """The twin of a case with as few inputs made initializers as it takes: none, the second, all but the first."""
    names = list(inputs)
    for promoted in ([], names[1:2], names[1:]):
        try:
            model = _loaded(proto, {name: inputs[name] for name in promoted})
            return model, import_graph(model)
        except UnsupportedModelError as error:
            refusal = error
    raise refusal


def _differs(got: torch.Tensor, expected: Array, case: Any) -> str:
    """What is wrong with an output, nothing where it is right."""
    tolerance = max((HALF[kind] for kind in HALF if expected.dtype == kind), default=0.0)
    wanted = expected.astype(np.float64 if expected.dtype.kind != "c" else np.complex128)
    found = (got.to(torch.float32) if got.dtype == torch.bfloat16 else got).numpy().astype(wanted.dtype)
    if found.shape != wanted.shape:
        return f"shape {found.shape}, expected {wanted.shape}"
    close = np.isclose(found, wanted, max(case.rtol, tolerance), max(case.atol, tolerance, 1e-7), equal_nan=True)
    return "" if close.all() else f"{(~close).sum()} of {close.size} numbers differ"


def run_case(case: Any) -> str:
    """``passed``, ``refused`` with a message, or what differs."""
    for given, expected in case.data_sets:
        inputs = {v.name: _as_array(x) for v, x in zip(case.model.graph.input, given, strict=True)}
        try:
            model, twin = _imported(case.model, inputs)
        except UnsupportedModelError as error:
            return f"refused: {error}"
        with torch.no_grad():
            outputs = twin(*(carried(inputs[str(v.name)], v.dtype or ir.DataType.FLOAT) for v in model.graph.inputs))
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        for got, wanted in zip(found, expected, strict=True):
            wrong = _differs(got, np.asarray(_as_array(wanted)), case)
            if wrong:
                return wrong
    return "passed"


def _operators(case: Any) -> frozenset[str]:
    """The operators of a case that the importer must have; empty where it is about something else."""
    nodes = [node for node in case.model.graph.node if node.op_type != "Constant"]
    names = {OLD_NAMES.get(node.op_type, node.op_type) for node in nodes}
    return frozenset(names) if names <= set(TABLE) and not any(node.domain for node in nodes) else frozenset()


@pytest.fixture(scope="session")
def cases() -> list[Any]:
    """Every case about claimed operators: single nodes, and the bodies of operators that are functions."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's on overflows and casts in the making of the cases
        return [case for case in collect_testcases() if _operators(case)]


@pytest.fixture(scope="session")
def outcomes(cases: list[Any]) -> dict[str, Outcome]:
    return {case.name: Outcome(_operators(case), run_case(case)) for case in cases}


def _matching(patterns: dict[str, str], names: Any) -> Iterator[tuple[str, list[str]]]:
    for pattern in patterns:
        yield pattern, [name for name in names if re.search(pattern, name)]


def test_every_case_passes_or_is_left_out_for_a_reason(outcomes: dict[str, Outcome]) -> None:
    left_out = {name for _, names in _matching(REFUSED | DIFFERENT, outcomes) for name in names}
    wrong = {name: o.result for name, o in outcomes.items() if name not in left_out and o.result != "passed"}
    assert wrong == {}
    assert len(outcomes) - len(left_out) > 1400


def test_every_operator_has_a_case_that_passes(outcomes: dict[str, Outcome]) -> None:
    passed: dict[str, int] = defaultdict(int)
    for outcome in outcomes.values():
        for name in outcome.operators if outcome.result == "passed" else ():
            passed[name] += 1
    assert set(TABLE) - set(passed) == set(WITHOUT_CASES)


def test_what_is_left_out_is_so_still(outcomes: dict[str, Outcome]) -> None:
    """No pattern is stale or hides a case that passes; a refusal names the node and the opset, or the input."""
    for pattern, names in _matching(REFUSED, outcomes):
        assert names, pattern
        for name in names:
            result = outcomes[name].result
            assert re.match(r"refused: (node '.*': operator \w+ \(opset \d+\)|'.*': an input of a type)", result), name
    for pattern, names in _matching(DIFFERENT, outcomes):
        assert names, pattern
        assert all("differ" in outcomes[name].result for name in names)


@pytest.mark.parametrize(
    ("operator", "case_name", "wrong"),
    [
        ("Relu", "test_relu", lambda op: Call(torch.abs, (op.arg(0),))),
        ("Trilu", "test_tril_neg", lambda op: Call(torch.tril, (op.arg(0),))),
        ("CumSum", "test_cumsum_1d_exclusive", lambda op: Call(torch.cumsum, (op.arg(0), 0))),
        ("ArgMax", "test_argmax_keepdims_example_select_last_index", lambda op: Call(
            torch.argmax, (op.arg(0), 1, True))),
        ("Shape", "test_shape", lambda op: Call(torch.clone, (op.arg(0),))),
    ],
)  # fmt: skip
def test_a_planted_bug_shows(operator: str, case_name: str, wrong: Any, cases: list[Any]) -> None:
    case = next(case for case in cases if case.name == case_name)
    assert run_case(case) == "passed"
    right = TABLE[operator]
    TABLE[operator] = wrong
    try:
        assert re.search("differ|shape", run_case(case))
    finally:
        TABLE[operator] = right
