"""`qopt attack` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qopt.cli import main

pytestmark = pytest.mark.long

HEAD = "g (float[n, 1, 6, 6] x) => (float[n, 4] y)"
GRAPHS = {
    "model": f"{HEAD} {{ c = Conv <pads = [1, 1, 1, 1]> (x, k) a = Relu(c) f = Flatten(a) y = Gemm(f, w) }}",
    "rounded": f"{HEAD} {{ c = Conv <pads = [1, 1, 1, 1]> (x, k) a = Relu(c) q = QuantizeLinear(a, s, z) r = DequantizeLinear(q, s, z) f = Flatten(r) y = Gemm(f, w) }}",  # noqa: E501
    "broken": f"{HEAD} {{ f = Flatten(x) l = Gemm(f, v) o = Sub(l, l) y = Div(l, o) }}",
    "wide": "g (float[n, 1, 7, 7] x) => (float[n, 4] y) { f = Flatten(x) y = Gemm(f, m) }",
    "text": "g (int64[n, 6] x) => (float[n, 6, 4] y) { y = Gather(v, x) }",
}  # fmt: skip


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


ARRAYS = {
    "k": normal(5, 1, 3, 3), "w": 0.2 * normal(180, 4), "v": normal(36, 4), "m": normal(49, 4),
    "s": np.array(0.6, np.float32), "z": np.array(0, np.uint8),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_model: Callable[..., onnx.ModelProto]) -> Path:
    """A folder with models, and images that the first of them classifies right."""
    folder = tmp_path_factory.mktemp("cli")
    for name, graph in GRAPHS.items():
        used = {key: array for key, array in ARRAYS.items() if f" {key})" in graph or f"({key}," in graph
                or f" {key}," in graph}  # fmt: skip
        onnx.save(text_model(graph, **used), folder / f"{name}.onnx")
    images = np.random.default_rng(1).integers(0, 256, (24, 1, 6, 6), dtype=np.uint8)
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    labels = session.run(None, {"x": images.astype(np.float32) / np.float32(255)})[0].argmax(1)
    np.savez(folder / "data.npz", x=images, y=labels)
    np.savez(folder / "labels.npz", x=images, y=labels + 3)
    np.savez(folder / "box.npz", x=images.astype(np.float32), y=labels)
    (folder / "corrupt.onnx").write_bytes((folder / "model.onnx").read_bytes()[:60])
    return folder


def run(*arguments: str | Path, cwd: Path, cache: str = "cache") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qopt", "attack", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        check=False, env={**os.environ, "QOPT_CACHE": str(cwd / cache)},
    )  # fmt: skip


def test_from_start_to_end(place: Path) -> None:
    words = ["model.onnx", "--data", "data.npz", "--eps", "8/255", "--source", "rounded.onnx@4/255"]
    done = run(*words, "--save", "adversarial.npz", "--threads", "1", cwd=place)
    assert done.returncode == 0, done.stderr
    for word in ("linf 8/255, preset quick", "PGD-20x3 margin", "gray (rounded)", "linf 4/255", "zero_gradients"):
        assert word in done.stdout
    assert done.stdout.rstrip().endswith("no sign of masked gradients.")
    assert "FGSM (linf 8/255): 0 of 24 images, robust accuracy so far 100.0 %" in done.stderr
    assert "masking rules" in done.stderr
    with np.load(place / "adversarial.npz") as file:
        assert set(file.files) == {"images", "labels", "fooled_by"}
        assert (file["fooled_by"] != "").any()
    again = run(*words, "--json", "-q", "--batch", "5", cwd=place)
    report = json.loads(again.stdout)
    assert again.stderr == ""
    assert f"{report['robust_accuracy']:.1f} %" in done.stdout
    assert report["interval"]["n"] == 24
    assert [row["eps"] for row in report["rows"]] == pytest.approx([8 / 255] * 3 + [4 / 255] * 2)


def here(
    *arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """The command in this process, which has imported torch: exit code, stdout and stderr."""
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("QOPT_CACHE", str(cwd / "cache"))
    monkeypatch.setattr(sys, "argv", ["qopt", "attack", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *capfd.readouterr()


def test_masked_gradients_end_with_1(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["rounded.onnx", "--data", "data.npz", "--eps", "0.05", "--images", "6", "--no-cache", "--json"]
    code, out, err = here(*options, "--gradients", "plain", cwd=place, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 1, err
    assert json.loads(out)["masking"] == "masked"
    assert "PGD-20 (linf 0.05): 0 of 6 images" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.onnx"], 2, "missing.onnx: no such model file"),
        (["corrupt.onnx"], 3, "corrupt.onnx"),
        (["text.onnx"], 3, "no classifier of images"),
        (["broken.onnx"], 3, "a logit that is not finite"),
        (["wide.onnx"], 2, "expected (1, 7, 7), got (1, 6, 6)"),
        (["model.onnx", "--data", "nowhere.npz"], 2, "nowhere.npz: no such data"),
        (["model.onnx", "--data", "labels.npz"], 2, "label out of range"),
        (["model.onnx", "--data", "box.npz"], 2, "outside the box"),
        (["model.onnx", "--eps", "wide"], 2, "--eps: eps is not a number"),
        (["model.onnx", "--eps", "nan"], 2, "--eps: eps must be a finite number"),
        (["model.onnx", "--norm", "l1"], 2, "--norm: unknown norm"),
        (["model.onnx", "--preset", "papr"], 2, "did you mean 'papers'"),
        (["model.onnx", "--images", "0"], 2, "--images: must be at least 1"),
        (["model.onnx", "--threads", "0"], 2, "--threads: must be at least 1"),
        (["model.onnx", "--mean", "0.5"], 2, "mean and std need the same number"),
        (["model.onnx", "--source", "model.onnx@x"], 2, "--source model.onnx@x: eps is not a number"),
        (["model.onnx", "--save", "none/x.npz"], 2, "--save none/x.npz: no such folder"),
        (["model.onnx", "--gradients", "none"], 2, "expected honest or plain"),
        (["model.onnx", "--frobnicate"], 2, "No such option"),
    ],
)
def test_wrong_input_is_one_line_and_the_right_code(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: list[str], code: int, words: str,
) -> None:  # fmt: skip
    data = [] if "--data" in arguments else ["--data", "data.npz"]
    ended, out, err = here(*arguments, *data, "-q", cwd=place, monkeypatch=monkeypatch, capfd=capfd)
    assert ended == code, err
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    if "No such option" not in err:
        assert len(err.strip().splitlines()) == 1


def test_data_is_needed(place: Path) -> None:
    done = run("model.onnx", cwd=place)
    assert done.returncode == 2
    assert "--data" in done.stderr


def test_a_wrong_word_ends_before_torch_is_imported(place: Path) -> None:
    code = (
        "import sys; from qopt.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )  # fmt: skip
    for words in (["--eps", "wide"], ["--norm", "l1"], ["--save", "none/x.npz"]):
        command = [sys.executable, "-c", code, "attack", "model.onnx", "--data", "data.npz", *words]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


def test_interrupted_ends_with_130_and_goes_on(place: Path, tmp_path: Path) -> None:
    # a shell that starts tests in the background has them ignore the signal, which Python would inherit
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    options = ["attack", "model.onnx", "--data", "data.npz", "--preset", "papers", "--images", "4", "--save", "x.npz"]
    command = [sys.executable, "-c", f"{listen}; from qopt.cli import main; main()", *options]
    environment = {**os.environ, "QOPT_CACHE": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "ZOO" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted, nothing was written; the same command goes on where it stopped" in rest
    assert "Traceback" not in rest
    assert not (place / "x.npz").exists()
    assert len(list((tmp_path / "attack").iterdir())) > 20


def test_help(place: Path) -> None:
    done = run("--help", cwd=place)
    assert done.returncode == 0
    for word in ("--preset", "--source", "--save", "qopt attack out/model.onnx"):
        assert word in done.stdout
