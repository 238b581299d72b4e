"""The scripts under `examples/` run as a user runs them, in processes of their own, and print what they promise."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

SCRIPTS = ("attack_foreign_onnx.py", "custom_cost_model.py", "deployment_toolchain.py")


def run(script: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The script in an empty folder; one thread, so that it shares the machine with other tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QOPT_CACHE": str(place / "cache")}
    return subprocess.run(
        [sys.executable, str(script), *words], cwd=place, env=environment, text=True, capture_output=True, timeout=300
    )


@pytest.mark.long
def test_attack_on_a_foreign_file(examples: Path, tmp_path: Path) -> None:
    done = run(examples / "attack_foreign_onnx.py", tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", done.stdout)]
    assert sizes[1] < 0.4 * sizes[0]
    left = [float(number) for number in re.findall(r"leaves +([\d.]+) %", done.stdout)]
    assert len(left) >= 5
    assert "on float" in done.stdout
    found = {
        name: (float(value), float(low), float(high), masked)
        for name, value, low, high, masked in re.findall(
            r"^(honest|naive): ([\d.]+) % robust \(([\d.]+)-([\d.]+)\), masked gradients: (.+)$",
            done.stdout,
            re.MULTILINE,
        )
    }
    assert found["honest"][0] <= min(left)
    assert found["honest"][0] <= found["naive"][0]
    assert all(low <= value <= high for value, low, high, _ in found.values())
    assert (found["honest"][3], found["naive"][3]) == ("none", "masked")
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.long
def test_custom_cost_model(examples: Path, tmp_path: Path) -> None:
    done = run(examples / "custom_cost_model.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, slow, fast, refused = done.stdout.splitlines()
    assert first == "the contract holds"
    plans = {}
    for line in (slow, fast):
        match = re.fullmatch(r"latency<=(\d+)us: (.*); ([\d.]+) us of one image; ([\d,]+) bytes", line)
        assert match is not None, line
        layers = {name: int(count) for count, name in re.findall(r"(\d+) layers in (\w+)", match[2])}
        plans[int(match[1])] = layers, float(match[3]), int(match[4].replace(",", ""))
    (slow_bound, of_slow), (fast_bound, of_fast) = sorted(plans.items(), reverse=True)
    assert of_slow[1] <= slow_bound
    assert of_fast[1] <= fast_bound
    assert sum(of_slow[0].values()) == sum(of_fast[0].values()) == 10
    assert of_fast[0]["int4"] > of_slow[0].get("int4", 0)
    assert of_fast[2] < of_slow[2]
    assert "no plan keeps the limit" in refused
    assert "board" in refused


@pytest.mark.long
def test_deployment_toolchain(examples: Path, tmp_path: Path) -> None:
    done = run(examples / "deployment_toolchain.py", tmp_path, "delivery")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    summary = json.loads(lines[-1])
    assert lines[0].startswith("int2: clean_drop<=15 (found ")
    assert lines[1] == "int4: every gate holds"
    folder = tmp_path / summary["folder"]
    assert folder == tmp_path / "delivery" / "int4"
    assert (folder / "model.onnx").stat().st_size == summary["bytes"]
    assert {"report.html", "plan.json", "manifest.json"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert summary["robust"] == pytest.approx(report["robust_accuracy"], abs=0.05)
    assert "measured selection" in done.stderr
    with np.load(examples / "fashion.npz") as file:
        pixels, labels = file["x_test"][:32].astype(np.float32) / 255, file["y_test"][:32]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
    assert summary["clean"] == round(100 * float((np.asarray(logits).argmax(1) == labels).mean()), 1)


@pytest.mark.long
def test_a_toolchain_without_a_target_that_passes_says_so(examples: Path, tmp_path: Path) -> None:
    """The gates made unreachable, by a line that a caller could write."""
    script = tmp_path / "strict.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(examples)!r})\n"
        "import deployment_toolchain as job\n"
        "from pathlib import Path\n"
        'job.TARGETS, job.GATES = (("nothing", ()), ("int8", ("speed<=1",))), ()\n'
        'sys.exit(job.main(Path("delivery")))\n'
    )
    done = run(script, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "nothing: --target: unknown target" in done.stdout
    assert "int8: --limit: unknown quantity" in done.stdout
    assert done.stdout.splitlines()[-1] == "no target passed"
    assert not (tmp_path / "delivery").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_say_what_they_are_and_how_they_run(name: str, examples: Path) -> None:
    tree = ast.parse((examples / name).read_text())
    text = ast.get_docstring(tree)
    assert text is not None
    assert f"python examples/{name}" in text
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    assert all(ast.get_docstring(node) for node in functions)
    assert f"`{name}`" in (examples / "README.md").read_text()
