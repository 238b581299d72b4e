"""What `import qopt` offers, and what it and the quick commands must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qopt

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "scipy", "optuna", "onnx", "onnxruntime", "matplotlib", "onnxscript")


def test_exported_names() -> None:
    assert qopt.__all__ == [
        "AnalysisReport",
        "AttackReport",
        "Bundle",
        "CertifyReport",
        "Comparison",
        "Data",
        "Options",
        "Plan",
        "QoptError",
        "Report",
        "__version__",
        "analyze",
        "attack",
        "certify",
        "compare",
        "load",
        "load_data",
        "optimize",
        "preview",
    ]
    assert all(getattr(qopt, name) is not None for name in qopt.__all__)
    assert dir(qopt) == qopt.__all__


def test_what_is_offered_stays_what_it_is_when_all_is_imported() -> None:
    """A subpackage of the same name would take its place."""
    places = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "qopt").iterdir()}
    assert not places & set(qopt.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'qopt' has no attribute 'optimise'"):
        getattr(qopt, "optimise")  # noqa: B009


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["optimize", "--help"],
        ["attack", "--help"],
        ["compare", "--help"],
        ["analyze", "--help"],
        ["certify", "--help"],
    ],
)
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['qopt', *sys.argv[1:]]\n"
        "from qopt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")


@pytest.mark.parametrize("name", ["passes", "search"])
def test_links_at_the_top_refuse_to_be_imported(name: str) -> None:
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import qopt.{name}" in done.stderr
