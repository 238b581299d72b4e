"""One run of the main job on part of the embedded example, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qopt
from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data, Split
from qopt.graph.load import load_model
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.runtime.session import to_bytes


@pytest.fixture(scope="session")
def fashion(examples: Path) -> Data:
    """A tenth of the embedded images."""
    with np.load(examples / "fashion.npz") as file:
        arrays = {name: file[name] for name in file.files}

    def part(name: str, start: int, stop: int) -> Split:
        images = arrays[f"x_{name}"][start:stop].astype(np.float32) / 255
        return Split(images, arrays[f"y_{name}"][start:stop].astype(np.int64))

    return Data(part("train", 0, 200), part("train", 200, 400), part("test", 0, 300))


@pytest.fixture(scope="session")
def example_model(examples: Path) -> ir.Model:
    """The embedded network, loaded."""
    return load_model(examples / "fashion_resnet.pt")


@pytest.fixture(scope="session")
def example_onnx(example_model: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded network as an ONNX file, which loads in a fraction of the archive's time."""
    path = tmp_path_factory.mktemp("onnx") / "fashion_resnet.onnx"
    path.write_bytes(to_bytes(example_model))
    return path


@pytest.fixture(scope="session")
def run_options() -> dict[str, Any]:
    """Options that keep a run to seconds."""
    return {"target": "int4", "robust": True, "attack_images": 100, "probe_images": 64, "calibration_images": 128}


@pytest.fixture(scope="session")
def bundle(examples: Path, fashion: Data, run_options: dict[str, Any]) -> qopt.Bundle:
    """The main job on the embedded example."""
    return qopt.optimize(examples / "fashion_resnet.pt", data=fashion, **run_options)


@pytest.fixture(scope="module")
def run(example_model: ir.Model, fashion: Data) -> Run:
    """A robust run of few images, as it starts."""
    options = Options(robust=True, attack_images=40, calibration_images=64, baselines=())
    return start(Task(example_model, "example", fashion, options), Cache(None), lambda step: None)
