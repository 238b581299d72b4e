"""Options from `qopt.toml` and `pyproject.toml`: what counts, and what is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import helper, numpy_helper
from onnx.parser import parse_graph
from typer.testing import CliRunner

from qopt.cli import app
from qopt.commands.settings import find, options
from qopt.errors import UsageError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(*words: str) -> dict[str, Any]:
    """What ``--show-config`` prints, read back."""
    done = CliRunner().invoke(app, [*words, "--show-config"], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, Any] = tomllib.loads(done.stdout)["optimize"]
    return found


def refused(*words: str) -> UsageError:
    error = CliRunner().invoke(app, [*words]).exception
    assert isinstance(error, UsageError), error
    assert "\n" not in str(error)
    return error


def test_without_a_file_the_defaults_hold() -> None:
    assert find(Path()) is None
    found = shown("optimize", "m.onnx")
    assert (found["target"], found["seed"], found["robust"], found["cache"]) == ("int4", 0, False, True)
    assert "limit" not in found
    assert "trust" not in found


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(place: Path) -> None:
    (place / "qopt.toml").write_text(
        '[optimize]\ntarget = "int8"\nlimit = ["bits<=3.5", "size<=1MB"]\nrobust = true\ncache = false\neps = 0.1\n'
        "probe-images = 64\n"
    )
    done = CliRunner().invoke(app, ["optimize", "m.onnx", "--target", "int2", "--show-config"])
    origins = dict([*line.split(" = ")[:1], line.rpartition("  # ")[2]] for line in done.stdout.splitlines()[1:])
    assert {k: v for k, v in origins.items() if v != "default"} == {
        "target": "command line", "limit": "file", "robust": "file", "cache": "file", "eps": "file",
        "probe-images": "file",
    }  # fmt: skip
    found = shown("optimize", "m.onnx", "--target", "int2")
    assert (found["target"], found["robust"], found["cache"], found["eps"]) == ("int2", True, False, "0.1")
    assert found["limit"] == ["bits<=3.5", "size<=1MB"]
    assert found["probe-images"] == 64


def test_what_is_shown_can_be_the_file(place: Path) -> None:
    words = ["optimize", "m.onnx", "--limit", "bits<=3.5", "--robust", "--gate", "clean_drop<=1", "--seed", "5"]
    done = CliRunner().invoke(app, [*words, "--show-config"])
    (place / "qopt.toml").write_text(done.stdout)
    assert shown("optimize", "m.onnx") == tomllib.loads(done.stdout)["optimize"]


def test_pyproject_counts_where_it_has_a_table_of_qopt(place: Path) -> None:
    (place / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert find(place) is None
    (place / "pyproject.toml").write_text("[tool.qopt.optimize]\nseed = 9\n[tool.other]\na = 1\n")
    assert shown("optimize", "m.onnx")["seed"] == 9
    (place / "qopt.toml").write_text("[optimize]\nseed = 4\n")
    assert shown("optimize", "m.onnx")["seed"] == 4, "qopt.toml goes first"
    (place / "mine.toml").write_text("[optimize]\nseed = 6\n")
    assert shown("--config", "mine.toml", "optimize", "m.onnx")["seed"] == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[optimize]\ntarge = "int8"\n', "qopt.toml, [optimize]: unknown key (got 'targe'); did you mean 'target'"),
        ("[optimze]\nseed = 1\n", "no such table"),
        ("seed = 1\n", "got the key 'seed' outside of a table); put options under their command, such as [optimize]"),
        ("[optimize]\nrobust = 1\n", "[optimize]: robust: wrong kind of value (expected true or false, got 1)"),
        ("[optimize]\nseed = true\n", "seed: wrong kind of value (expected text or a number, got True)"),
        ("[optimize]\nseed = [1]\n", "seed: wrong kind of value"),
        ('[optimize]\nlimit = "bits<=3"\n', "limit: not a list"),
        ("[optimize]\nlimit = [true]\n", "limit: wrong kind of value"),
        ("[optimize]\ntrust = true\n", "a file cannot vouch for other files; give --trust on the command line"),
        ('[optimize]\nmodel = "evil.module:run"\n', "code to run (got 'evil.module:run'); give --config qopt.toml"),
        ('[attack]\ndata = "evil.module:run"\n', "names code to run"),
        ("[optimize\n", "qopt.toml: not a TOML file"),
        ('[optimize]\nlimit = ["bits<=nought"]\n', "--limit"),
        ('[optimize]\nsearch = "greedi"\n', "--search: unknown name (got 'greedi')"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(place: Path, text: str, words: str) -> None:
    (place / "qopt.toml").write_text(text)
    assert words in str(refused("optimize", "m.onnx", "--show-config"))


def test_whoever_names_the_file_vouches_for_the_code_it_names(place: Path) -> None:
    (place / "mine.toml").write_text('[optimize]\ndata = "package.module:images"\n')
    assert shown("--config", "mine.toml", "optimize", "m.onnx")["data"] == "package.module:images"


def test_a_file_that_cannot_be_read_is_named(place: Path) -> None:
    assert (
        str(refused("--config", "none.toml", "targets")) == "none.toml: cannot be read (got No such file or directory)"
    )
    (place / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "bytes.toml: not a TOML file" in str(refused("--config", "bytes.toml", "targets"))


def test_every_option_of_every_command_has_a_key() -> None:
    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        flags = [max(p.opts, key=len) for p in command.params if p.opts[0].startswith("-") and p.name != "help"]
        assert [f"--{key}" for key in options(command)] == flags


def test_other_commands_take_their_tables(place: Path) -> None:
    (place / "qopt.toml").write_text("[targets]\njson = true\n[optimize]\nseed = 2\n")
    done = CliRunner().invoke(app, ["targets"], catch_exceptions=False)
    assert done.stdout.lstrip()[0] in "[{"


def test_every_command_shows_examples_in_its_help() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for path, one in _leaves(name, command):
            done = CliRunner().invoke(app, [*path, "--help"])
            assert done.exit_code == 0
            assert f"qopt {' '.join(path)}" in " ".join(done.stdout.split()), path
            assert "Example" in str(one.epilog), path


def _leaves(name: str, command: Any) -> list[tuple[list[str], Any]]:
    """The commands behind a word, with the words that lead there."""
    if not hasattr(command, "commands"):
        return [([name], command)]
    return [([name, sub], one) for sub, one in command.commands.items()]


@pytest.fixture
def task(place: Path) -> list[str]:
    """A command on a network of one layer with images for it."""
    graph = parse_graph(
        "one (float[n,1,4,4] x) => (float[n,3] y) <float[16,3] w> { f = Flatten (x) y = MatMul (f, w) }"
    )
    weight = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), place / "m.onnx")
    np.savez(place / "d.npz", x_test=np.zeros((40, 1, 4, 4), np.uint8), y_test=np.arange(40) % 3)
    return ["optimize", "m.onnx", "--data", "d.npz", "--no-cache", "--dry-run", "--json", "--quiet"]


@pytest.mark.parametrize(
    ("file", "words", "holds"),
    [
        ("", [], "int8"),
        ('activations = "int6"\n', [], "int6"),
        ('activations = "int6"\n', ["--activations", "int5"], "int5"),
        ("", ["--activations", "int5"], "int5"),
        ('activations = "int6"\ntarget = "int2"\n', [], "int6"),
    ],
)
def test_a_preset_is_what_neither_the_command_line_nor_the_file_says(
    place: Path, task: list[str], file: str, words: list[str], holds: str
) -> None:
    """The target stands for formats of activations, too; whoever names one means it, whatever the target."""
    (place / "qopt.toml").write_text(f"[optimize]\n{file}")
    done = CliRunner().invoke(app, [*task, *words], catch_exceptions=False)
    assert f"; activations {holds};" in json.loads(done.stdout)["target"]
