"""A file whose weights are never held as a whole: the result is that of a module in memory, in bounded memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qopt
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.graph.stored import SMALLEST_FILE, stays_in_file

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FEW, MANY = 6e6, 5e7


@pytest.fixture(scope="module")
def streaming() -> Any:
    """The benchmark's network, of the fewest parameters that are streamed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv("QOPT_STREAMING_PARAMETERS", str(FEW))
        yield importlib.import_module("streaming")


@pytest.fixture(scope="module")
def file(streaming: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("streamed") / "model.safetensors"
    streaming.write_file(path)
    return path


@pytest.fixture(scope="module")
def bundle(streaming: Any, file: Path) -> qopt.Bundle:
    return qopt.optimize(file, factory="streaming:network", target="int4-uniform")


def test_weights_stay_in_the_file(streaming: Any, file: Path) -> None:
    assert file.stat().st_size > SMALLEST_FILE
    assert stays_in_file(prepare(load_model(file, factory="streaming:network")).model)


def test_it_is_checked_and_says_what_was_not(bundle: qopt.Bundle) -> None:
    assert bundle.report.kernels.difference is not None
    assert bundle.report.kernels.floating == 2
    assert any("weights stay in their file" in reason for reason in bundle.report.left_out)
    assert bundle.manifest["latency_seconds"] == {}
    assert 7.5 < bundle.report.size.float_bytes / bundle.report.size.file_bytes < 8


def test_the_same_file_as_of_the_module_in_memory(streaming: Any, file: Path, bundle: qopt.Bundle) -> None:
    import safetensors.torch

    module, example = streaming.network()
    module.load_state_dict(safetensors.torch.load_file(file))
    held = qopt.optimize(module.eval(), example=(example,), target="int4-uniform")
    assert held.report.kernels.floating == 2
    assert held.plan.to_json() == bundle.plan.to_json()
    assert held.model == bundle.model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.skipif(not os.environ.get("QOPT_REQUIRE_ALL"), reason="takes minutes: QOPT_REQUIRE_ALL is not set")
def test_memory_of_fifty_million_parameters() -> None:
    command = [sys.executable, str(BENCHMARKS / "streaming.py"), "--whole", "--parameters", str(MANY), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["bytes"] > 4 * 0.99 * MANY
    assert found["steps"]["optimize"]["peak"] <= 1.5 * found["bytes"]
