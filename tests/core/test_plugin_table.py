"""The plugin table against real packages on sys.path, and every built-in name against its contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qopt.errors import PluginError, UsageError
from qopt.plugins import BUILT_IN, Plugin, checked, load, plugins

REPORT = """
import json, sys
from qopt.errors import QoptError
from qopt.plugins import checked, load, plugins
out = {}
for group in ("qopt.cost_models", "qopt.unused"):
    try:
        out[group] = {n: [p.origin, p.target, checked(p).error] for n, p in plugins(group).items()}
    except QoptError as error:
        out[group] = f"{type(error).__name__}: {error}"
for name in sys.argv[1:]:
    try:
        out[name] = repr(load("qopt.cost_models", name, "--target"))
    except QoptError as error:
        out[name] = f"{type(error).__name__}: {error}"
out["imported"] = sorted(name for name in sys.modules if name.startswith("plug_"))
print(json.dumps(out))
"""


def package(folder: Path, name: str, version: str, points: str, source: str) -> None:
    """An installed distribution: a module and its dist-info."""
    (folder / f"plug_{name}.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


def report(folder: Path, *names: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-c", REPORT, *names]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_installed_plugins_are_listed_and_loaded(tmp_path: Path) -> None:
    points = "[qopt.cost_models]\ndevice = plug_cool:Device\nnested = plug_cool:Outer.Inner\nwhole = plug_cool\n"
    source = "Device = 'the device'\nclass Outer:\n    Inner = 'inside'\n"
    package(tmp_path, "cool", "1.2", points, source)
    found = report(tmp_path, "device", "nested", "whole", "bits")
    table = found["qopt.cost_models"]
    assert list(table) == sorted([*BUILT_IN["qopt.cost_models"], "device", "nested", "whole"])
    assert table["device"] == ["cool 1.2", "plug_cool:Device", None]
    assert table["bits"][0] == "qopt"
    assert (found["device"], found["nested"]) == ("'the device'", "'inside'")
    assert found["whole"].startswith("<module 'plug_cool'")
    assert found["qopt.unused"] == {}


BREAKS = {
    "import no_such_module_at_all": "ModuleNotFoundError: No module named 'no_such_module_at_all'",
    "x = (": "SyntaxError: ",
    "raise RuntimeError('planted')": "RuntimeError: planted",
    "raise SystemExit('bye')": "SystemExit: bye",
    "Other = 1": "AttributeError: module 'plug_bad' has no attribute 'Model'",
}


@pytest.mark.parametrize(("source", "reason"), BREAKS.items())
def test_a_plugin_that_does_not_load_is_named_and_hides_no_other(tmp_path: Path, source: str, reason: str) -> None:
    package(tmp_path, "bad", "0.1", "[qopt.cost_models]\nbroken = plug_bad:Model\n", source)
    found = report(tmp_path, "broken", "bits")
    assert found["broken"].startswith(
        "PluginError: qopt.cost_models broken from bad 0.1: the plugin does not load (got "
    )
    assert reason in found["broken"]
    assert found["qopt.cost_models"]["broken"][2] == found["broken"].removeprefix("PluginError: ")
    assert {row[2] for name, row in found["qopt.cost_models"].items() if name != "broken"} == {None}
    assert found["bits"] == "<class 'qopt.hardware.bits.BitsModel'>"


def test_nothing_is_imported_before_it_is_used(tmp_path: Path) -> None:
    package(tmp_path, "cool", "1", "[qopt.attacks]\nx = plug_cool:X\n[qopt.passes]\ny = plug_cool:Y\n", "X = Y = 1")
    assert report(tmp_path)["imported"] == []


def test_two_packages_with_one_name_are_an_error(tmp_path: Path) -> None:
    for name in ("one", "other"):
        package(tmp_path, name, "2", "[qopt.cost_models]\ndevice = plug_one:X\n", "X = 1")
    message = report(tmp_path)["qopt.cost_models"]
    assert message.startswith("PluginError: qopt.cost_models device: two plugins have the same name")
    assert "one 2" in message
    assert "other 2" in message
    assert "uninstall one of them" in message


def test_a_package_cannot_take_the_name_of_a_built_in(tmp_path: Path) -> None:
    package(tmp_path, "evil", "6", "[qopt.cost_models]\nbits = plug_evil:X\n", "X = 1")
    found = report(tmp_path, "bits")
    assert found["qopt.cost_models"] == found["bits"]
    assert "two plugins have the same name (got qopt and evil 6)" in found["bits"]


@pytest.mark.parametrize("group", BUILT_IN)
def test_built_in_names_load_and_call_themselves_so(group: str) -> None:
    table = plugins(group)
    assert list(table) == sorted(table)
    for name, plugin in table.items():
        loaded = load(group, name, "--x")
        assert checked(plugin) == plugin
        assert loaded.__doc__
        assert (loaded().name.lower() if group == "qopt.attacks" else loaded.name).startswith(name)


@pytest.mark.parametrize(
    ("group", "name", "words"),
    [
        ("qopt.searches", "gredy", ["--search: unknown name (got 'gredy')", "did you mean 'greedy'"]),
        ("qopt.searches", "", ["one of exact, greedy, lipschitz, optuna, quanos, refit, uniform"]),
        ("qopt.nothing", "greedy", ["there are none"]),
    ],
)
def test_unknown_names_offer_the_nearest(group: str, name: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(group, name, "--search")
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_failed_load_keeps_its_cause() -> None:
    plugin = Plugin("qopt.searches", "x", "qopt.hardware.bits:Missing", "somewhere 1")
    with pytest.raises(PluginError) as caught:
        plugin.load()
    assert isinstance(caught.value.__cause__, AttributeError)
    assert checked(plugin).error == str(caught.value)
