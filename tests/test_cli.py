"""The command line: what a user sees for right and wrong inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qopt
from qopt.quiet import stdout_to_stderr


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in ``cwd``, without a cache outside it."""
    return subprocess.run(
        [sys.executable, "-m", "qopt", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "QOPT_CACHE": str(cwd / "cache"), **environment},
    )  # fmt: skip


def network(op: str = "Relu", weight: float = 0.5) -> onnx.ModelProto:
    """Images (n, 1, 4, 4) through one convolution, ``op`` and a linear layer to three logits."""
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(4, 1, 3, 3)).astype(np.float32) * weight
    dense = generator.normal(size=(64, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node(op, ["c"], ["a"], name="act"),
        helper.make_node("Flatten", ["a"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "fc.weight"], ["y"], name="fc"),
    ]
    tensors = [numpy_helper.from_array(kernel, "conv.weight"), numpy_helper.from_array(dense, "fc.weight")]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "small", [image], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with right and wrong models and data."""
    folder = tmp_path_factory.mktemp("cli")
    onnx.save(network(), folder / "model.onnx")
    onnx.save(network("Sigmoidal"), folder / "unsupported.onnx")
    onnx.save(network(weight=float("nan")), folder / "nan.onnx")
    (folder / "corrupt.onnx").write_bytes(network().SerializeToString()[:100])
    (folder / "text.pt").write_text("hello\n")
    (folder / "file").write_text("")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    labels = generator.integers(0, 3, 40)
    arrays: dict[str, Any] = {"x_train": images, "y_train": labels, "x_test": images[::-1], "y_test": labels[::-1]}
    np.savez(folder / "data.npz", **arrays)
    np.savez(folder / "wide.npz", x=np.zeros((4, 3, 8, 8), np.uint8), y=np.zeros(4, np.int64))
    (folder / "garbage.npz").write_bytes(b"not an archive")
    return folder


def test_right_input_from_start_to_end(place: Path) -> None:
    done = run(
        "optimize", "model.onnx", "--robust", "--data", "data.npz", "--eps", "8/255", "--gate", "clean_drop<=100",
        "--calibration", "mixed", "--activations", "int8:mse", "-o", "out", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("target int4: weights ternary, int2, int3, int4")
    for word in (
        "conv.weight",
        "fc.weight",
        "||dW||",
        "MACs",
        "uniform int4:max",
        "naive evaluation",
        "latency",
        "gate",
    ):
        assert word in done.stdout
    assert "report   out/report.html" in done.stdout
    assert "attacking the float network" in done.stderr
    assert "mixed images to calibrate on" in done.stderr
    assert not {"\x1b", "\r"} & set(done.stdout + done.stderr), "no colours and no bars where there is no terminal"
    assert {p.name for p in (place / "out").iterdir()} >= {"model.onnx", "plan.json", "report.md", "manifest.json"}


@pytest.mark.long
def test_json_is_one_object_on_stdout(place: Path) -> None:
    done = run("optimize", "model.onnx", "--json", "--quiet", "-o", "out-json", cwd=place)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["schema"] == 1
    assert report["robust_accuracy"] is None
    assert done.stderr == ""


@pytest.mark.long
def test_a_failed_gate_ends_with_1_and_is_emitted(place: Path) -> None:
    done = run("optimize", "model.onnx", "--data", "data.npz", "--gate", "clean_drop<=0", "-o", "failed", cwd=place)
    assert done.returncode == 1
    assert "FAILS" in done.stdout
    assert (place / "failed" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.onnx"], 2, "missing.onnx: no such model file"),
        (["."], 2, "the model is a folder"),
        (["corrupt.onnx"], 3, "corrupt.onnx: the ONNX file is damaged"),
        (["text.pt"], 3, "not a model file that qopt knows"),
        (["unsupported.onnx"], 3, "Sigmoidal"),
        (["nan.onnx"], 3, "conv.weight"),
        (["model.onnx", "--target", "int5"], 2, "unknown target (got 'int5')"),
        (["model.onnx", "--data", "wide.npz"], 2, "expected (1, 4, 4), got (3, 8, 8)"),
        (["model.onnx", "--data", "nowhere.npz"], 2, "nowhere.npz: no such data"),
        (["model.onnx", "--data", "garbage.npz"], 2, "garbage.npz"),
        (["model.onnx", "--limit", "bits<=1"], 2, "no plan keeps the limit"),
        (["model.onnx", "--limit", "speed<=1"], 2, "unknown quantity"),
        (["model.onnx", "--gate", "clean_drop<=1"], 2, "give --data"),
        (["model.onnx", "--eps", "wide", "--robust"], 2, "eps is not a number"),
        (["model.onnx", "--search", "gready"], 2, "did you mean 'greedy'"),
        (["model.onnx", "--calibration", "mixed"], 2, "--calibration: adversarial images are made of images"),
        (["model.onnx", "--calibration", "dirty"], 2, "expected auto, clean, adversarial, mixed"),
        (["model.onnx", "--mean", "a,b"], 2, "--mean: not a list of numbers"),
        (["model.onnx", "--input-shape", "1,x"], 2, "--input-shape: not a list of numbers"),
        (["model.onnx", "--data", "no_such_module:make"], 2, "no_such_module"),
        (["model.onnx", "-o", "file"], 2, "the output folder is a file"),
        (["model.onnx", "--frobnicate"], 2, "No such option"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_input_is_one_line_the_right_code_and_no_output(
    place: Path, arguments: list[str], code: int, words: str
) -> None:
    out = [] if "-o" in arguments else ["-o", "wrong"]
    done = run("optimize", *arguments, *out, "--quiet", cwd=place)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (place / "wrong").exists()
    if not any(word in done.stderr for word in ("No such option", "Missing argument")):
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_a_module_pickle_is_refused_with_the_safe_ways(place: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 2), place / "module.pt")
    done = run("optimize", "module.pt", "-o", "wrong", "--quiet", cwd=place)
    assert done.returncode == 3
    for way in ("torch.export.save", "--model package.module:factory", "--trust"):
        assert way in done.stderr
    assert not (place / "wrong").exists()


@pytest.mark.long
@pytest.mark.parametrize("debug", [False, True])
def test_an_internal_error_is_one_line_unless_debugging(place: Path, debug: bool) -> None:
    code = (
        "import sys, qopt.api\n"
        "def broken(*args, **options): raise ZeroDivisionError('planted')\n"
        "qopt.api.optimize = broken\n"
        "from qopt.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "optimize", "model.onnx", *(["--debug"] if debug else [])]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert "planted" in done.stderr
    assert ("Traceback" in done.stderr) is debug
    if not debug:
        assert done.returncode == 4
        assert "internal error: ZeroDivisionError: planted; --debug shows where" in done.stderr


def test_interrupted_ends_with_130_and_writes_nothing(place: Path, examples: Path) -> None:
    # a shell that starts tests in the background has them ignore the signal, which Python would inherit
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; from qopt.cli import main; main()", "optimize"]
    command += [str(examples / "fashion_resnet.pt"), "--robust", "--no-cache"]
    command += ["--data", str(examples / "fashion.npz"), "-o", "interrupted"]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "second moments" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted, nothing was written" in rest
    assert "Traceback" not in rest
    assert not (place / "interrupted").exists()


def test_version_and_plugins(place: Path) -> None:
    assert run("--version", cwd=place).stdout == f"qopt {qopt.__version__}\n"
    listed = run("plugins", cwd=place)
    assert listed.returncode == 0
    for word in ("qopt.searches", "greedy", "lipschitz", "qopt.cost_models", "bits"):
        assert word in listed.stdout
    wrong = run("plugins", "qopt.serches", cwd=place)
    assert wrong.returncode == 2
    assert "did you mean 'qopt.searches'" in wrong.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["optimize", "--help"], ["plugins", "--help"]])
def test_help(place: Path, arguments: list[str]) -> None:
    done = run(*arguments, cwd=place)
    assert done.returncode == 0
    assert done.stderr == ""
    if arguments[0] == "--help":
        assert "Exit codes" in done.stdout
    if arguments[0] == "optimize":
        assert "qopt optimize model.onnx --target int4" in done.stdout


def test_native_output_is_kept_off_stdout() -> None:
    code = (
        "import os, sys\n"
        "from qopt.quiet import stdout_to_stderr\n"
        "print('before')\n"
        "with stdout_to_stderr():\n"
        "    os.write(1, b'native\\n'); print('python')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nafter\n"
    assert sorted(done.stderr.split()) == ["native", "python"]


def test_the_guard_restores_stdout_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), stdout_to_stderr():
        raise ValueError("inside")
    print("again")
    assert capfd.readouterr().out == "again\n"
