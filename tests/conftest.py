"""Fixtures that every test folder shares, and the rule on skips."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import numpy_helper

# the same examples in every run, however slow the machine: a failure that one machine finds, all of them find
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of the embedded example."""
    return EXAMPLES


@pytest.fixture(scope="session")
def assets() -> Path:
    """The public networks and images that QOPT_ASSETS names; skips where it is unset."""
    folder = os.environ.get("QOPT_ASSETS")
    if not folder:
        pytest.skip("QOPT_ASSETS is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def text_model() -> Callable[..., onnx.ModelProto]:
    """An ONNX model from the text of its graph, with arrays for initializers by name."""

    def parse(graph: str, opset: int = 21, **arrays: Any) -> onnx.ModelProto:
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{graph}')
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        return model

    return parse


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With QOPT_REQUIRE_ALL a skipped test is a failed one: in CI everything it names is installed."""
    report = yield
    if os.environ.get("QOPT_REQUIRE_ALL") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although QOPT_REQUIRE_ALL is set: {report.longrepr}"
    return report


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory, examples: Path) -> Path:
    """A folder with the embedded network, ``model.onnx``, and few of its images, ``few.npz``."""
    from qopt.graph.load import load_model
    from qopt.runtime.session import to_bytes

    folder = tmp_path_factory.mktemp("few")
    (folder / "model.onnx").write_bytes(to_bytes(load_model(examples / "fashion_resnet.pt")))
    with np.load(examples / "fashion.npz") as file:
        few = {"train": 128, "test": 40}
        arrays = {f"{kind}_{part}": file[f"{kind}_{part}"][:n] for part, n in few.items() for kind in "xy"}
    np.savez(folder / "few.npz", **arrays)
    return folder
