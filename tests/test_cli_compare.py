"""`qopt compare`: what a user sees for right and wrong inputs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qopt.cli import main
from qopt.job.compare import compare
from qopt.report.comparison import Comparison
from qopt.report.comparison_views import text

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command in ``place``, in this process, as importing torch takes seconds; its cache is there too."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("QOPT_CACHE", "cache")
    threads = torch.get_num_threads()

    def called(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["qopt", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code, (out, err) = ended.value.code or 0, capfd.readouterr()
        assert isinstance(code, int)
        return Done(code, out, err)

    yield called
    torch.set_num_threads(threads)


def network(seed: int, shape: tuple[int, ...] = (1, 4, 4)) -> onnx.ModelProto:
    """Images through one convolution and a linear layer to three logits, quantized by hand where ``seed`` is 2."""
    generator = np.random.default_rng(1 if seed % 2 == 0 else 0)
    kernel = generator.normal(size=(4, shape[0], 3, 3)).astype(np.float32) * 0.5
    dense = generator.normal(size=(3, 4 * shape[1] * shape[2])).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Flatten", ["d" if seed == 2 else "a"], ["f"]),
        helper.make_node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
    ]
    tensors = [numpy_helper.from_array(kernel, "conv.weight"), numpy_helper.from_array(dense, "fc.weight")]
    if seed == 2:
        tensors += [
            numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
            numpy_helper.from_array(np.array(0, np.uint8), "zero"),
        ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    nodes = [node for node in nodes if seed == 2 or "Linear" not in node.op_type]
    graph = helper.make_graph(nodes, "small", [image], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks and images that the float one labels, so that it is right about all."""
    folder = tmp_path_factory.mktemp("cli")
    for name, seed in (("float", 0), ("coarse", 2), ("other", 1)):
        onnx.save(network(seed), folder / f"{name}.onnx")
    onnx.save(network(0, (3, 4, 4)), folder / "wide.onnx")
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    np.savez(folder / "data.npz", x=images, y=labels(folder / "float.onnx", images))
    (folder / "file").write_text("")
    (folder / "text.onnx").write_text("hello\n")
    return folder


def labels(path: Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answers: np.ndarray = session.run(None, {"x": images.astype(np.float32) / 255})[0].argmax(1)
    return answers


OPTIONS = ("--data", "data.npz", "--eps", "16/255", "--steps", "3", "--kappa", "1", "--seed", "2")
MODELS = ("float.onnx", "coarse.onnx", "other.onnx")


@pytest.fixture(scope="module")
def expected(place: Path) -> Comparison:
    options: dict[str, Any] = {"eps": 16 / 255, "steps": 3, "kappas": (1.0,), "seed": 2}
    return compare([place / model for model in MODELS], data=place / "data.npz", **options)


def without_command(found: Comparison) -> Comparison:
    return found.model_copy(update={"command": ""})


def test_tables_and_the_folder(run: Run, place: Path, expected: Comparison) -> None:
    done = run("compare", *MODELS, *OPTIONS, "-o", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == text(expected) + "\nreport  out/compare.html\n"
    assert "] CW-L2 10x3 on B\n" in done.stderr.replace("kappa 1 ", "")
    assert "linf 16/255, seed 2" in done.stdout
    written = Comparison.from_json((place / "out" / "compare.json").read_text())
    assert without_command(written) == without_command(expected)
    assert written.command == shlex.join(["qopt", "compare", *MODELS, "--data", "data.npz", *command_options()])
    assert {path.name for path in (place / "out").iterdir()} == {"compare.json", "compare.md", "compare.html"}
    assert expected.models[0].clean.value == 100
    assert expected.attacks[0].accuracy[0][0] != 100
    assert [row.target for row in expected.activation_shift] == ["B"] * 4
    assert {value.value for row in expected.activation_shift for value in row.values} == {"a"}


def command_options() -> list[str]:
    return ["--eps", f"{16 / 255:.17g}", "--steps", "3", "--kappa", "1", "--seed", "2"]


def test_json_is_one_object_on_stdout_and_comes_from_what_was_kept(run: Run, place: Path, expected: Comparison) -> None:
    for name in ("first", "second"):
        done = run("compare", *MODELS, *OPTIONS, "--json", "-q", "-o", name)
        assert (done.returncode, done.stderr) == (0, "")
        assert without_command(Comparison.from_json(done.stdout)) == without_command(expected)
        assert (place / name / "compare.json").read_text() == done.stdout
    assert len(list((place / "cache" / "examples").iterdir())) == 4 * 3


def test_options_arrive(run: Run) -> None:
    done = run(
        "compare", "float.onnx", "other.onnx", "--data", "data.npz", "--attack", "pgd", "--attack", "fgsm",
        "--norm", "l2", "--eps", "0.5", "--images", "11", "--mean", "0.9", "--std", "0.1", "--threads", "1",
        "--no-cache", "--json", "--steps", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [attack["name"] for attack in found["attacks"]] == ["PGD-2", "FGSM"]
    assert (found["threat"], found["images"], found["models"][0]["clean"]["n"]) == ("l2 0.5", 11, 11)
    assert "--mean 0.9 --std 0.1" in found["command"]
    assert found["models"][0]["clean"]["value"] < 100, "the labels were made without a mean"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["float.onnx", "--data", "data.npz"], 2, "compared with each other (expected 2 to 26, got 1)"),
        (["float.onnx", "missing.onnx", "--data", "data.npz"], 2, "missing.onnx: no such model file"),
        (["float.onnx", "text.onnx", "--data", "data.npz"], 3, "text.onnx: not a model file that qopt knows"),
        (["float.onnx", "wide.onnx", "--data", "data.npz"], 2, "wide.onnx: the networks take images of different"),
        (["float.onnx", "other.onnx", "--data", "no.npz"], 2, "no.npz: no such data"),
        (["float.onnx", "other.onnx", "--data", "data.npz", "--attack", "fgms"], 2, "did you mean 'fgsm'?"),
        (["float.onnx", "other.onnx", "--data", "data.npz", "--eps", "x"], 2, "--eps: eps is not a number"),
        (["float.onnx", "other.onnx", "--data", "data.npz", "--kappa", "a,b"], 2, "--kappa: not a list of numbers"),
        (["float.onnx", "other.onnx", "--data", "data.npz", "-o", "file"], 2, "file: the output folder is a file"),
    ],
)
def test_wrong_inputs(run: Run, arguments: list[str], code: int, words: str) -> None:
    done = run("compare", *arguments, "-q")
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_imports_nothing_heavy(place: Path) -> None:
    code = (
        "import sys\nfrom qopt.cli import main\n"
        "sys.argv = ['qopt', 'compare', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'scipy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")
    assert "--kappa" in done.stdout
