"""`qopt analyze` from the command line: results on stdout, mistakes in one line with their exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qopt.cli import main
from qopt.graph.to_onnx import module_to_onnx
from qopt.report.analysis_report import AnalysisReport
from qopt.runtime.session import to_bytes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module: Any = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    (path / "net.onnx").write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    images = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(images)).argmax(1).numpy()
        module[1].weight[0, 0] = float("nan")
    (path / "broken.onnx").write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    np.savez(path / "images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(path / "wide.npz", x=np.zeros((4, 1, 9, 9), np.float32), y=np.zeros(4, np.int64))
    (path / "text.txt").write_text("no model")
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The entry point in this process: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["qopt", "analyze", *words, "--no-cache"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def test_norms_alone(run: Run) -> None:
    code, out, err = run("net.onnx", "-q", "--target", "int8")
    assert (code, err) == (0, "")
    for word in ("1.weight", "3.weight", "operator linf", "int8", "measured with --data"):
        assert word in out


def test_the_report_and_its_json(run: Run) -> None:
    common = ("net.onnx", "--data", "images.npz", "--eps", "0.01", "--images", "20", "--formats", "int3, log4:max")
    code, out, err = run(*common, "--json", "-q")
    assert (code, err) == (0, "")
    report = AnalysisReport.from_json(out)
    assert report.formats == ["int3", "log4:max"]
    assert (report.images, report.eps) == (20, 0.01)
    assert json.loads(out)["schema"] == 1
    code, out, err = run(*common, "--candidates")
    assert code == 0
    assert out.rstrip().endswith(report.verdict)
    assert "Candidates, rounded to nearest" in out
    assert "loss with one layer quantized at a time" in err


def test_help_shows_examples_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['qopt', 'analyze', '--help']\n"
        "from qopt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'scipy', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "qopt analyze model.onnx --data images.npz" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("none.onnx",), 2, "none.onnx"),
        (("text.txt",), 3, "text.txt"),
        (("broken.onnx",), 3, "1.weight"),
        (("net.onnx", "--data", "none.npz"), 2, "none.npz"),
        (("net.onnx", "--data", "wide.npz"), 2, "images do not fit the network"),
        (("net.onnx", "--formats", "int9"), 2, "--formats: not a weight format"),
        (("net.onnx", "--target", "int5"), 2, "unknown target"),
        (("net.onnx", "--eps", "nan"), 2, "eps must be a finite number"),
        (("net.onnx", "--eps", "x"), 2, "eps is not a number"),
        (("net.onnx", "--norm", "l1"), 2, "unknown norm"),
        (("net.onnx", "--threads", "0"), 2, "at least 1"),
        (("net.onnx", "--images", "0"), 2, "at least 1"),
        (("net.onnx", "--mean", "0.5"), 2, "same number of channels"),
    ],
)
def test_mistakes(run: Run, words: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = run(*words, "-q")
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_wrong_words_are_refused_before_anything_heavy() -> None:
    code = (
        "import sys; sys.argv = ['qopt', 'analyze', 'none.onnx', '--formats', 'int9']\n"
        "from qopt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--formats: not a weight format" in done.stderr
