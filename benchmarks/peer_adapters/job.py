"""What every adapter gets and gives: ``python -m peer_adapters.NAME JOB.json`` in a process of its own.

The job names a network, the images that calibrate, and a folder. The adapter writes ``model.onnx`` there and
``facts.json``: its version, the CPU seconds that quantizing took after its imports, and what else is to be known.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

FILE, FACTS, JOB = "model.onnx", "facts.json", "job.json"


@dataclass(frozen=True)
class Job:
    """One network for one peer.

    Attributes:
        assets: the folder of the public networks.
        network: the name of one.
        eps: radius of its threat model in linf, as text.
        images: float32 (n, c, h, w) in [0, 1], all of them train images; ``labels``: int64 (n,).
        out: the folder to write to.
        setting: which of the adapter's settings.
    """

    assets: Path
    network: str
    eps: str
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    out: Path
    setting: str

    @property
    def onnx(self) -> Path:
        """The float network as an ONNX file that takes any batch."""
        return self.assets / "onnx" / f"{self.network}.onnx"

    @property
    def input(self) -> str:
        """The name of its input."""
        return str(onnx.load(self.onnx).graph.input[0].name)

    @property
    def file(self) -> Path:
        """Where the quantized network goes."""
        return self.out / FILE

    def module(self) -> Any:
        """The float network as a PyTorch module in eval mode."""
        place = importlib.util.spec_from_file_location("networks", self.assets / "networks.py")
        assert place is not None
        assert place.loader is not None
        networks = importlib.util.module_from_spec(place)
        place.loader.exec_module(networks)
        return networks.load(self.network).eval()

    def batches(self, size: int) -> list[NDArray[np.float32]]:
        """The images, so many at a time."""
        return [self.images[i : i + size] for i in range(0, len(self.images), size)]


def read_job(folder: Path) -> Job:
    """The job that `write_job` left in ``folder``."""
    told = json.loads((folder / JOB).read_text())
    with np.load(folder / "images.npz") as file:
        images, labels = file["images"], file["labels"]
    return Job(Path(told["assets"]), told["network"], told["eps"], images, labels, folder, told["setting"])


def write_job(job: Job) -> None:
    """Put the job where an adapter finds it."""
    np.savez(job.out / "images.npz", images=job.images, labels=job.labels)
    told = {"assets": str(job.assets), "network": job.network, "eps": job.eps, "setting": job.setting}
    (job.out / JOB).write_text(json.dumps(told))


def run(package: str, quantize: Callable[[Job], dict[str, Any]]) -> None:
    """Do the job in the folder that the command line names; ``package`` is whose version counts."""
    job = read_job(Path(sys.argv[1]))
    began = time.process_time()
    facts = quantize(job)
    seconds = time.process_time() - began
    told = {"version": version(package), "seconds": seconds, **facts}
    (job.out / FACTS).write_text(json.dumps(told))
