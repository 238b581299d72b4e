"""auto_LiRPA as a second opinion: clear words without it, and near our own margins with it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qopt.certificates.backward import Backward
from qopt.certificates.ball import Ball
from qopt.certificates.certificate import specification
from qopt.certificates.lirpa import lirpa_margins
from qopt.certificates.read import read
from qopt.errors import DataError, UnsupportedModelError
from qopt.graph.prepare import prepare
from qopt.plan import Defaults, Plan
from qopt.quantize import Quantizer
from qopt.threat import Norm, ThreatModel

INSTALLED = importlib.util.find_spec("auto_LiRPA") is not None


def test_without_the_library_the_error_says_what_to_do(
    cases: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    case = cases("plain")
    images = case.images(2)
    with pytest.raises(UnsupportedModelError, match="auto_LiRPA cannot be imported") as raised:
        lirpa_margins(case.twin, images, torch.zeros(2, dtype=torch.int64), ThreatModel("linf", 0.01))
    assert "install it" in str(raised.value)


def test_labels_that_do_not_fit_are_refused_before_anything_is_loaded(cases: Callable[..., Any]) -> None:
    case = cases("plain")
    with pytest.raises(DataError, match=r"\(2,\)"):
        lirpa_margins(case.twin, case.images(2), torch.zeros(3, dtype=torch.int64), ThreatModel("linf", 0.01))


def test_nothing_of_qopt_imports_it() -> None:
    code = "import sys, qopt.certificates.lirpa, qopt.api; sys.exit('auto_LiRPA' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SEQUENTIAL = """net (float[n,2,6,6] x) => (float[n,4] y) {
    c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1,1,1,1], strides = [2,2]> (r1, w2, b2)
    r2 = Relu (c2)
    f = Flatten (r2)
    y = Gemm <transB = 1> (f, w3, b3)
}"""
"""A kind of network that every version of auto_LiRPA takes."""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="auto_LiRPA is not installed")
@pytest.mark.parametrize("weights", ["float", "int4", "log4"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("linf", 0.05), ("l2", 0.05)])
def test_it_agrees_with_our_backward_bounds(
    text_model: Callable[..., onnx.ModelProto], weights: str, norm: Norm, eps: float
) -> None:
    """Both relax ReLU alike; ours counts float32's rounding, and the box around l2 balls that theirs leaves out."""
    chance = np.random.default_rng(3)
    shapes = {"w1": (4, 2, 3, 3), "b1": (4,), "w2": (5, 4, 3, 3), "b2": (5,), "w3": (4, 45), "b3": (4,)}
    arrays = {n: (chance.standard_normal(s) / np.sqrt(np.prod(s[1:]) + 1)).astype("f4") for n, s in shapes.items()}
    quantizer = Quantizer(prepare(ir.serde.deserialize_model(text_model(SEQUENTIAL, **arrays))))
    twin = quantizer.apply(Plan(defaults=Defaults(weights=weights, activations="float"))).graph
    images, threat = torch.from_numpy(chance.random((6, 2, 6, 6), "f4")), ThreatModel(norm, eps)
    labels = twin(images).argmax(1)
    theirs = lirpa_margins(twin, images, labels, threat)
    network = read(twin, (2, 6, 6))
    ours = Backward(network, Ball.around(images, threat)).lower(specification(labels, 4)).amin(1)
    assert bool((ours >= theirs - 5e-3).all())
    if norm == "linf":
        assert bool((theirs >= ours - 5e-3).all())
