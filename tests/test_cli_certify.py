"""`qopt certify` from the command line: results on stdout, mistakes in one line with their exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qopt.graph.to_onnx import module_to_onnx
from qopt.runtime.session import to_bytes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    (path / "net.onnx").write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    images = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(images)).argmax(1).numpy()
    np.savez(path / "images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    (path / "text.txt").write_text("no model")
    return path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qopt", "certify", *words, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_report_and_its_json(folder: Path) -> None:
    common = ("net.onnx", "--data", "images.npz", "--eps", "0.01", "--images", "20")
    shown, plain = run(folder, *common), run(folder, *common, "--json", "-q")
    assert shown.returncode == plain.returncode == 0, shown.stderr + plain.stderr
    found = json.loads(plain.stdout)
    assert plain.stderr == ""
    assert found["images"] == 20
    assert found["clean"]["value"] == 100
    assert shown.stdout.rstrip().endswith(found["verdict"])
    assert "bounds: backward" in shown.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("none.onnx", "--data", "images.npz"), 2, "none.onnx"),
        (("text.txt", "--data", "images.npz"), 3, "text.txt"),
        (("net.onnx", "--data", "none.npz"), 2, "none.npz"),
        (("net.onnx", "--data", "images.npz", "--eps", "x"), 2, "eps is not a number"),
        (("net.onnx", "--data", "images.npz", "--norm", "l1"), 2, "unknown norm"),
        (("net.onnx", "--data", "images.npz", "--method", "crown"), 2, "unknown method"),
        (("net.onnx", "--data", "images.npz", "--threads", "0"), 2, "at least 1"),
        (("net.onnx", "--data", "images.npz", "--images", "0"), 2, "at least 1"),
    ],
)
def test_mistakes(folder: Path, words: tuple[str, ...], code: int, message: str) -> None:
    done = run(folder, *words, "-q")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
