"""`qopt targets`: everything that a network can be compiled for, with the source of every constant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qopt.hardware.targets import TARGETS
from qopt.plugins import BUILT_IN


def run(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qopt", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "QOPT_CACHE": str(cwd / "cache"), **environment},
    )  # fmt: skip


def test_everything_is_listed(tmp_path: Path) -> None:
    done = run(tmp_path, "targets")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    heads = [line.split(":")[0].split(" (")[0] for line in lines if not line.startswith(" ")]
    assert sorted(heads) == sorted([*TARGETS, *(name.split(":")[0] for name in BUILT_IN["qopt.cost_models"])])
    for line in (
        "stm32f4 (qopt): prices latency [s], flash [B], sram [B]",
        "  limits: flash<=2097152, sram<=393216",
        "  multiply int8 = 2e-13 J, published: Horowitz, ISSCC 2014, figure 1.1.9 (45 nm, 0.9 V)",
        "  convolution in float: int1, ternary, int2, int3, int4, log4, int7, int8, int4:block32, int4:asym",
    ):
        assert line in lines
    assert not (tmp_path / "cache").exists()  # nothing was calibrated


def test_the_same_as_json(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path, "targets", "--json").stdout)
    assert [row["name"] for row in found["precisions"]] == list(TARGETS)
    models = {row["name"]: row for row in found["cost_models"]}
    assert sorted(models) == sorted(BUILT_IN["qopt.cost_models"])
    for row in models.values():
        assert row["origin"] == "qopt"
        assert {one["basis"] for one in row["constants"].values()} <= {"measured", "published", "assumed"}
        assert all(one["source"] and one["unit"] for one in row["constants"].values())
        assert set(row["takes"]) == {"convolution", "depthwise", "matrix product", "convolution in float"}
    assert models["stm32f4"]["limits"] == ["flash<=2097152", "sram<=393216"]
    assert "int8" not in models["x86-avx2"]["takes"]["convolution"]
    assert "int8" in models["x86-avx2"]["takes"]["convolution in float"]


@pytest.mark.parametrize("name", ["stm32f4", "int4", "measured:host"])
def test_one_target(tmp_path: Path, name: str) -> None:
    found = json.loads(run(tmp_path, "targets", name, "--json").stdout)
    assert [row["name"] for rows in found.values() for row in rows] == [name]
    assert run(tmp_path, "targets", name).stdout.startswith(name)


def test_an_unknown_one(tmp_path: Path) -> None:
    done = run(tmp_path, "targets", "stm32f5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qopt: unknown target (got 'stm32f5'); did you mean 'stm32f4'?\n"


def test_a_broken_model_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "plug_bad.py").write_text("class Model:\n    name = 'other'\n")
    info = tmp_path / "bad-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[qopt.cost_models]\nbroken = plug_bad:Model\ngone = plug_gone:X\n")
    done = run(tmp_path, "targets", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert "broken (bad 1): qopt.cost_models Model: the cost model lacks what its contract asks for" in done.stdout
    assert "gone (bad 1): qopt.cost_models gone from bad 1: the plugin does not load" in done.stdout
    assert "stm32f4 (qopt)" in done.stdout
    (row,) = [x for x in json.loads(run(tmp_path, "targets", "--json", PYTHONPATH=str(tmp_path)).stdout)["cost_models"]
              if x["name"] == "broken"]  # fmt: skip
    assert set(row) == {"name", "origin", "error"}


def test_targets_and_limits_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    done = run(tmp_path, "optimize", "nothing.onnx", "--target", "stm32f5")
    assert done.returncode == 2
    assert "did you mean 'stm32f4'?; `qopt targets` lists all" in done.stderr
    done = run(tmp_path, "optimize", "nothing.onnx", "--target", "stm32f4", "--limit", "latency<=5")
    assert "wrong unit for latency (expected s or ms or us, got '')" in done.stderr
    done = run(tmp_path, "optimize", "nothing.onnx", "--target", "int8,int4-uniform")
    assert "no weight format in common" in done.stderr


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['qopt', 'targets']\n"
        "from qopt.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'scipy', 'optuna') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"
