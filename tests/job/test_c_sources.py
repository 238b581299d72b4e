"""`--emit c`: the network as C beside the file, what the manifest says of it, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qopt
from qopt.data import Data
from qopt.errors import UnsupportedModelError, UsageError
from qopt.job.sources import c_name

FEW: dict[str, Any] = {
    "effort": "fast", "calibration_images": 64, "probe_images": 32, "attack_images": 20, "baselines": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(example_onnx: Path, fashion: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("c") / "out"
    qopt.optimize(example_onnx, data=fashion, emit=("c",), out=out, **FEW)
    return out


def test_three_files_lie_beside_the_onnx_file(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"fashion_resnet.c", "fashion_resnet.h", "fashion_resnet_test.c", "model.onnx"} <= names
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    facts = manifest["c"]
    assert facts["same_class"] >= facts["images"] - 1
    assert facts["arena_bytes"] <= 384 * 1024
    assert facts["flash_bytes"] <= 2 << 20
    assert f"{facts['macs']} multiply-accumulates" in (folder / "fashion_resnet.h").read_text()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is missing")
def test_it_compiles_and_its_self_test_holds(folder: Path, tmp_path: Path) -> None:
    sources = [str(folder / "fashion_resnet.c"), str(folder / "fashion_resnet_test.c")]
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2"]
    subprocess.run(["gcc", *flags, *sources, "-o", str(tmp_path / "test")], check=True)
    done = subprocess.run([str(tmp_path / "test")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "fashion_resnet: 0 of 30 codes wrong\n")


def test_the_command_says_so(example_onnx: Path, fashion: Data) -> None:
    bundle = qopt.optimize(example_onnx, data=fashion, emit=("c",), **FEW)
    assert bundle.report.command.endswith("--emit c") or "--emit c " in bundle.report.command


def test_wrong_words_and_no_data_are_refused(example_onnx: Path, fashion: Data) -> None:
    with pytest.raises(UsageError, match=r"--emit: unknown word \(expected onnx, c, got 'rust'\)"):
        qopt.optimize(example_onnx, data=fashion, emit=("rust",), **FEW)
    with pytest.raises(UsageError, match=r"--emit c: .*give --data"):
        qopt.optimize(example_onnx, emit=("c",))


def test_float_activations_are_refused_by_name(example_onnx: Path, fashion: Data) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quantize activations|not quantized"):
        qopt.optimize(example_onnx, data=fashion, emit=("c",), activations="float", **FEW)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fashion_resnet", "fashion_resnet"), ("My-Net v2", "my_net_v2"), ("3dnet", "net_3dnet"), ("...", "net"),
        ("a" * 50, "a" * 31),
    ],
)  # fmt: skip
def test_names_become_identifiers(name: str, expected: str) -> None:
    assert c_name(name) == expected
