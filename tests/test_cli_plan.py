"""`qopt plan show | diff | apply`, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qopt.plan import Plan

pytestmark = pytest.mark.long


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qopt", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a linear model of two layers and plans for it."""
    folder = tmp_path_factory.mktemp("plans")
    generator = np.random.default_rng(0)
    arrays = {"first": generator.normal(size=(16, 32)), "second": generator.normal(size=(3, 16))}
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "first"], ["h"], name="one", transB=1),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "second"], ["y"], name="two", transB=1),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in (("x", 32), ("y", 3))]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    (folder / "plan.json").write_text(Plan(weights={"first": "int4", "second": "int8"}).to_json())
    (folder / "edited.json").write_text(Plan(weights={"first": "int4:block16", "second": "int8"}).to_json())
    (folder / "wrong.json").write_text(Plan(weights={"third": "int4"}).to_json())
    (folder / "broken.json").write_text('{"schema": 1, "weights": {"a": "int9"}}')
    return folder


def test_show_and_diff(place: Path) -> None:
    shown = run("plan", "show", "plan.json", cwd=place)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\nweights\n  first   int4\n  second  int8\n" in shown.stdout
    same, other = (run("plan", "diff", "plan.json", name, cwd=place) for name in ("plan.json", "edited.json"))
    assert (same.returncode, same.stdout) == (0, "")
    assert (other.returncode, other.stdout) == (1, "- weights.first  int4\n+ weights.first  int4:block16\n")


def test_apply_writes_what_the_plan_says_and_shows_the_folder(place: Path) -> None:
    done = run("plan", "apply", "edited.json", "model.onnx", "-q", "-o", "out", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "out" / "plan.json").read_text())["weights"] == {
        "first": "int4:block16", "second": "int8",
    }  # fmt: skip
    model = onnx.load(place / "out" / "model.onnx")
    formats = {p.value for node in model.graph.node for p in node.metadata_props if p.key == "qopt.format"}
    assert formats == {"int4:block16", "int8"}
    folder = run("plan", "show", "out", cwd=place)
    assert "int4:block16" in folder.stdout
    again = run("optimize", "model.onnx", "--plan", "edited.json", "-q", "-o", "again", cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "again" / "model.onnx").read_bytes() == (place / "out" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "missing.json"], "missing.json: cannot read the plan"),
        (["show", "broken.json"], "broken.json"),
        (["diff", "plan.json", "missing.json"], "missing.json: cannot read the plan"),
        (
            ["apply", "wrong.json", "model.onnx", "-o", "no"],
            "third: the plan names a layer that the model does not have",
        ),
        (["apply", "plan.json", "missing.onnx", "-o", "no"], "missing.onnx"),
        (["apply", "plan.json", "model.onnx", "-o", "plan.json"], "the output folder is a file"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments: list[str], words: str, place: Path) -> None:
    done = run("plan", *arguments, cwd=place)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (place / "no").exists()


def test_reading_plans_is_quick() -> None:
    code = (
        "import sys\nsys.argv = ['qopt', 'plan', '--help']\nfrom qopt.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nimport qopt.plan_text\n"
        "print([m for m in ('torch', 'scipy', 'optuna', 'onnx', 'onnxruntime', 'rich.table') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] in ("[]", "['rich.table']"), "the help text itself may use rich"
