"""What a command line owes whoever runs it: it starts at once, and says no more, and no more colourful, than asked."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper

from qopt.cli import app
from qopt.plan import Defaults, Plan

HEAVY = ("torch", "scipy", "optuna", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "matplotlib", "numpy", "PIL")
"""Libraries that take tenths of a second to import, of which no command that only reads texts has need."""

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-79]|38;|4[0-79]|9\d|10\d)[\d;]*m")
ESCAPE = "\x1b"

IMPORTED = f"""
import atexit, sys
atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))
sys.argv[0] = "qopt"
from qopt.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan, a network of one layer, and images for it."""
    folder = tmp_path_factory.mktemp("manners")
    (folder / "plan.json").write_text(Plan(defaults=Defaults(weights="int4"), weights={"w": "int3"}).to_json())
    weight = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "one", [image], [logits], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return folder


def environment(place: Path, **more: str) -> dict[str, str]:
    """Without what the terminal of whoever runs the tests would say."""
    names = ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR", "PY_COLORS",
             "GITHUB_ACTIONS", "TERM")  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "QOPT_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **more}


def piped(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qopt", *words], cwd=place, capture_output=True, text=True, check=False,
        env=environment(place, **more),
    )  # fmt: skip


def on_a_terminal(place: Path, *words: str, **more: str) -> tuple[int, str]:
    """Exit code, and what a terminal gets to show."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qopt", *words], cwd=place, stdin=follower, stdout=follower, stderr=follower,
        env=environment(place, **more),
    )  # fmt: skip
    os.close(follower)
    shown = bytearray()
    while True:
        try:
            if select.select([leader], [], [], 60)[0]:
                part = os.read(leader, 65536)
                shown += part
                if part:
                    continue
        except OSError:  # how Linux says that nobody writes any more
            pass
        break
    os.close(leader)
    return process.wait(), shown.decode()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], ["--version"], ["plan", "--help"], ["plan", "show", "plan.json"],
        ["plan", "diff", "plan.json", "."],
    ],
)  # fmt: skip
def test_what_only_reads_texts_starts_at_once(place: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *words], cwd=place, capture_output=True, text=True, check=True,
        env=environment(place),
    )  # fmt: skip
    assert done.stderr.splitlines() == ["[]"]
    assert done.stdout or words[1] == "diff"


def test_the_check_of_imports_is_sharp(place: Path) -> None:
    code = IMPORTED.replace("from qopt.cli", "import numpy\nfrom qopt.cli")
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True, env=environment(place)
    )
    assert done.stderr.splitlines() == ["['numpy']"]


@pytest.mark.parametrize("words", [["--help"], ["optimize", "--help"], ["targets"], ["plan", "show", "plan.json"]])
def test_without_a_terminal_there_are_no_escape_codes(place: Path, words: list[str]) -> None:
    done = piped(place, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert ESCAPE not in done.stdout


def test_json_is_one_document_and_what_verbose_adds_is_elsewhere(place: Path) -> None:
    done = piped(place, "optimize", "model.onnx", "--json", "-v", "-o", "out-json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads((place / "out-json" / "report.json").read_text())
    assert not {ESCAPE, "\r"} & set(done.stdout + done.stderr), "no bars, no colours"
    steps = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert all(re.fullmatch(r"\[ *\d+\.\d s\] .+", line) for line in steps)
    assert len(steps) > 3
    assert re.search(r"\d+\.\d s  prepare the model", done.stderr)
    assert "from the cache: " in done.stderr


def test_colours_of_the_help_are_left_out_where_they_are_not_wanted(place: Path) -> None:
    code, coloured = on_a_terminal(place, "--help")
    assert (code, bool(COLOUR.search(coloured))) == (0, True), "else this test shows nothing"
    code, plain = on_a_terminal(place, "--help", NO_COLOR="1")
    assert (code, COLOUR.findall(plain)) == (0, [])
    assert "optimize" in plain


def test_colours_of_progress_and_result_are_left_out_where_they_are_not_wanted(place: Path) -> None:
    code, shown = on_a_terminal(place, "optimize", "model.onnx", "-o", "out", NO_COLOR="1")
    assert (code, COLOUR.findall(shown)) == (0, [])
    assert "prepare the model" in shown
    assert "report   out/report.html" in shown


def test_every_command_that_gives_a_result_can_give_it_as_json() -> None:
    group: Any = typer.main.get_command(app)
    written = {"plan", "plugins", "worker"}
    for name, command in group.commands.items():
        flags = [flag for option in command.params for flag in option.opts] if name not in written else ["--json"]
        assert "--json" in flags, name


def test_every_command_that_takes_time_can_be_quiet() -> None:
    group: Any = typer.main.get_command(app)
    at_once = {"plan", "plugins", "targets", "doctor"}
    for name, command in group.commands.items():
        flags = [flag for option in command.params for flag in option.opts]
        assert ("--quiet" in flags) is (name not in at_once), name
