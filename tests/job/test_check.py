"""`qopt check`: a folder as it was written holds; every planted change is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import qopt
from qopt.cli import app
from qopt.data import Data, Split
from qopt.errors import UsageError
from qopt.job.check import check_folder
from qopt.report.model import Report
from qopt.runtime.shipped import shipped_weights

FEW: dict[str, Any] = {"calibration_images": 64, "probe_images": 32, "baselines": (), "effort": "fast"}


@pytest.fixture(scope="module")
def written(example_onnx: Path, fashion: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    qopt.optimize(example_onnx, data=fashion, out=folder / "images", limits=("bits<=3.5",), **FEW)
    qopt.optimize(example_onnx, out=folder / "bare", target="int4")
    return folder


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "images", tmp_path / "out"))


def found(folder: Path, data: Data | None = None) -> dict[str, bool | None]:
    return {row.name: row.holds for row in check_folder(folder, data)}


def changed(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file and its hash, as whoever knows of the hashes would."""
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_written_holds(out: Path, written: Path, fashion: Data) -> None:
    assert found(out, fashion) == dict.fromkeys(("hashes", "plan", "kernels", "norms", "accuracy"), True)
    assert found(out)["accuracy"] is None
    assert found(written / "bare", fashion) == {
        "hashes": True, "plan": True, "kernels": True, "norms": True, "accuracy": None
    }  # fmt: skip


def test_the_weights_are_those_that_the_file_computes(out: Path) -> None:
    """Each has the shape of its layer, and no more levels than its bits allow a row."""
    report = Report.from_json((out / "report.json").read_text())
    weights = dict(shipped_weights(out / "model.onnx", {row.name: row.shape for row in report.layers}))
    assert list(weights) == [row.name for row in report.layers]
    for row in report.layers:
        assert len(np.unique(weights[row.name][0][0])) <= 2**row.bits
        assert list(weights[row.name][0].shape) == row.shape


def test_a_changed_byte_is_found(out: Path) -> None:
    (out / "report.md").write_text((out / "report.md").read_text() + " ")
    (row,) = [row for row in check_folder(out) if row.holds is False]
    assert (row.name, row.text) == ("hashes", "report.md was changed")


def test_a_missing_file_is_found_and_one_outside_the_folder_is_not_looked_at(out: Path, tmp_path: Path) -> None:
    (out / "report.md").unlink()
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["../secret"] = hashlib.sha256(b"x").hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    row = check_folder(out)[0]
    assert not row.holds
    assert "report.md is missing" in row.text
    assert "../secret is missing" in row.text


def test_another_weight_is_found_by_its_norm(out: Path) -> None:
    def heavier(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        for initializer in model.graph.initializer:
            values = onnx.numpy_helper.to_array(initializer)
            if "fc.weight" in initializer.name and values.dtype == np.float32:
                initializer.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.01), initializer.name))
        return bytes(model.SerializeToString())

    changed(out, "model.onnx", heavier)
    rows = {row.name: row for row in check_folder(out)}
    assert rows["hashes"].holds
    assert rows["norms"].holds is False
    assert rows["norms"].text.startswith("fc.weight: ")


def test_another_plan_is_found(out: Path) -> None:
    layers = json.loads((out / "plan.json").read_text())["weights"]
    name, text = next(iter(layers.items()))
    changed(out, "plan.json", lambda data: data.replace(f'"{name}": "{text}"'.encode(), f'"{name}": "int7"'.encode()))
    rows = {row.name: row for row in check_folder(out)}
    assert rows["plan"].holds is False
    assert f"{name}: plan int7, report {text}, file {text}" in rows["plan"].text


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07"])
def test_a_broken_model_is_found_without_a_traceback(out: Path, content: bytes) -> None:
    changed(out, "model.onnx", lambda data: content)
    rows = {row.name: row for row in check_folder(out)}
    assert rows["hashes"].holds
    assert rows["kernels"].holds is False
    assert all("\n" not in row.text for row in rows.values())


def test_other_images_are_found_by_the_accuracy(out: Path, fashion: Data) -> None:
    wrong = Split(fashion.report.images, (fashion.report.labels + 1) % 10)
    assert found(out, Data(fashion.calibrate, fashion.select, wrong))["accuracy"] is False


def test_the_command(out: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(out), "-q"])
    assert done.exit_code == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["hashes", "holds"], ["plan", "holds"], ["kernels", "holds"], ["norms", "holds"], ["accuracy", "left"]
    ]  # fmt: skip
    (out / "report.md").unlink()
    done = CliRunner().invoke(app, ["check", str(out), "-q", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["holds"] is False
    error = CliRunner().invoke(app, ["check", str(tmp_path / "none"), "-q"]).exception
    assert isinstance(error, UsageError)
    assert "no output folder of qopt optimize" in str(error)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "{"])
def test_what_is_no_manifest_is_refused(out: Path, text: str) -> None:
    (out / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="not a manifest"):
        check_folder(out)
