"""The worked example is installed as a user would and used: listed, priced, its limits kept, its own tests green."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

USE = """
import json, sys
import qopt
from qopt.data import Data, Split
import numpy as np

with np.load(sys.argv[1]) as file:
    def part(name, start, stop):
        return Split(file[f"x_{name}"][start:stop].astype(np.float32) / 255, file[f"y_{name}"][start:stop].astype(int))
    data = Data(part("train", 0, 40), part("train", 100, 140), part("test", 0, 40))
options = {"effort": "fast", "probe_images": 8, "calibration_images": 40, "baselines": (), "target": "tiny-npu"}
bundle = qopt.optimize(sys.argv[2], data=data, limits=("latency<=350us",), **options)
out = {"target": bundle.report.target, "notes": bundle.report.search.notes, "errors": []}
out["formats"] = [layer.format for layer in bundle.report.layers]
for limit, given in (("latency<=100us", data), ("flash<=64KB", None)):
    try:
        qopt.optimize(sys.argv[2], data=given, limits=(limit,), **options)
    except qopt.QoptError as error:
        out["errors"].append(str(error))
print(json.dumps(out))
"""

BREAK = """
import json, math, sys
import qopt
import qopt_tiny_npu

def told(answer):
    def layer_cost(self, layer, spec):
        if isinstance(answer, Exception):
            raise answer
        return answer
    return layer_cost

right = {"latency": 1.0, "energy": 1.0, "flash": 1.0}
answers = [{**right, "latency": math.nan}, {**right, "latency": -1.0}, {"latency_ms": 1.0}]
answers += [RuntimeError("planted"), None]
qopt_tiny_npu.TinyNpu.capabilities = lambda self, layer, formats: tuple(formats)
said = []
for answer in answers:
    qopt_tiny_npu.TinyNpu.layer_cost = told(answer)
    try:
        qopt.optimize(sys.argv[1], target="tiny-npu")
    except qopt.QoptError as error:
        said.append([error.exit_code, str(error)])
print(json.dumps(said))
"""
SAID = [
    "latency is no cost (expected a finite number, at least 0, got nan)",
    "latency is no cost (expected a finite number, at least 0, got -1.0)",
    "costs are not those that it declares (expected latency, energy, flash, got latency_ms)",
    "the plugin failed (got RuntimeError: planted)",
    "costs are not those that it declares (expected latency, energy, flash, got None)",
]


@pytest.fixture(scope="module")
def installed(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(examples / "cost_model_plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--disable-pip-version-check", "--target", str(target), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Python with the package on its path."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": "1",
        "QOPT_CACHE": str(installed / "c"),
    }
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_it_is_listed_with_its_sources(installed: Path) -> None:
    (found,) = json.loads(run(installed, "-m", "qopt", "targets", "tiny-npu", "--json").stdout)["cost_models"]
    assert found["origin"] == "qopt-tiny-npu 0.1.0"
    assert found["prices"] == {"latency": "s", "energy": "J", "flash": "B"}
    assert found["limits"] == ["flash<=65536"]
    assert found["takes"]["convolution"] == ["int4", "int8"]
    assert found["takes"]["convolution in float"] == []
    assert found["constants"]["clock"]["basis"] == "published"
    assert "tiny-npu" in run(installed, "-m", "qopt", "plugins", "qopt.cost_models").stdout


def test_it_is_a_target(installed: Path, examples: Path, example_model_file: Path) -> None:
    done = run(installed, "-c", USE, examples / "fashion.npz", example_model_file)
    found = json.loads(done.stdout)
    assert found["target"] == (
        "tiny-npu: weights int4, int4:max, int8; activations int8; flash<=65536, latency<=0.00035s; priced by tiny-npu"
    )
    assert set(found["formats"]) <= {"int4", "int4:max", "int8"}
    assert len(set(found["formats"])) > 1
    (note,) = [note for note in found["notes"] if note.startswith("on tiny-npu: ")]
    assert "(limit 350 us)" in note
    assert "(limit 64 KB)" in note
    slow, floats = found["errors"]
    assert slow.startswith("latency<=0.0001s: no plan keeps the limit (got at least ")
    assert "us on tiny-npu with these candidates" in slow
    assert floats.startswith("layer stem.weight: tiny-npu takes none of the formats for a layer")
    assert floats.endswith("give --data")


def test_its_own_tests_pass(installed: Path, examples: Path) -> None:
    test = installed / "test_qopt_tiny_npu.py"
    shutil.copy(examples / "cost_model_plugin" / test.name, test)
    assert "4 passed" in run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", test).stdout


def test_a_broken_one_is_named_in_one_line(installed: Path, example_model_file: Path) -> None:
    found = json.loads(run(installed, "-c", BREAK, example_model_file).stdout)
    assert found == [[4, f"cost model tiny-npu, stem.weight in ternary: {said}"] for said in SAID]


def test_a_wrong_unit_is_named_before_anything_runs(installed: Path, tmp_path: Path, example_model_file: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(installed, broken, ignore=shutil.ignore_patterns("__pycache__", "c"))
    module = broken / "qopt_tiny_npu.py"
    module.write_text(module.read_text().replace('= units("latency", "energy", "flash")', '= {"latency": "ms"}', 1))
    command = ("-m", "qopt", "optimize", example_model_file, "--target", "tiny-npu", "-q", "-o", "out")
    message = run(broken, *command, code=4).stderr
    assert message == "qopt: cost model tiny-npu, prices: latency in the wrong unit (expected s, got 'ms')\n"
    assert "latency in the wrong unit" in run(broken, "-m", "qopt", "targets").stdout
