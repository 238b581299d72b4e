"""Imports point to lower floors or stay inside their folder; walled libraries stay behind their walls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qopt"

FLOORS = {
    0: "errors seeds spec size plan limits config threat statistics files cache plugins factories quiet progress "
    "_version documents columns plan_text",
    1: "quant lipschitz data",
    2: "graph runtime",
    3: "passes attacks hardware emit certificates",
    4: "search report quantize",
    5: "measure",
    6: "job",
    7: "api terminal testing",
    8: "commands",
    9: "cli",
    10: "__main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}

WALLS = {
    "optuna": ("search/",),
    "networkx": ("graph/view.py", "search/widths.py"),
    "onnx": ("emit/", "runtime/", "graph/", "job/artefact.py"),
    "PIL": ("data.py",),
    "rich": ("terminal.py", "progress.py"),
    "typer": ("cli.py", "commands/"),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "__init__"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module in imports(path):
        if module == "qopt" or not module.startswith("qopt."):
            continue
        there = room(module)
        if there in ("__version__", here) or FLOOR[there] == FLOOR[here] == 0:
            continue
        assert FLOOR[there] < FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {module} (floor {FLOOR[there]})"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_walls_and_length(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for module in imports(path):
        allowed = WALLS.get(module.split(".")[0])
        assert allowed is None or any(place.startswith(wall) for wall in allowed), f"{place} imports {module}"
    assert len(path.read_text().splitlines()) <= 500
    assert path.name not in ("utils.py", "helpers.py", "common.py")


def test_every_module_has_a_floor() -> None:
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in sources()} - {"__init__"}
    assert rooms <= set(FLOOR)


def test_floor_zero_imports_no_torch() -> None:
    for path in sources():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if FLOOR.get(here) == 0:
            assert not [m for m in imports(path, top_level=True) if m.split(".")[0] in ("torch", "onnx", "onnxruntime")]


def test_only_the_loader_unpickles() -> None:
    words = ("weights_only=False", "pickle.load", "torch.export.load(", "jit.load(")
    found = [p for p in sources() if any(word in p.read_text() for word in words)]
    assert {p.relative_to(PACKAGE).as_posix() for p in found} <= {"graph/load.py"}
