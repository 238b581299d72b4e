"""Run an adapter in a process of its own, with a time limit; what it emits is kept by content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.job import FACTS, Job, write_job
from qopt.cache import Cache, digest_arrays

BENCHMARKS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Peer:
    """One tool in one setting.

    Attributes:
        name: as the table shows it; ``asked``: the word that names it on the command line.
        package: as pip knows it; ``adapter``: the module beside this one.
        setting: which of the adapter's settings.
    """

    name: str
    asked: str
    package: str
    adapter: str
    setting: str = ""

    @property
    def installed(self) -> str | None:
        """The version, None where it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


@dataclass(frozen=True)
class Emitted:
    """What a tool wrote.

    Attributes:
        file: the ONNX file's bytes.
        facts: what the adapter says: ``version``, ``seconds`` of CPU time, perhaps ``code_bits`` and ``note``.
    """

    file: bytes
    facts: dict[str, Any]


class PeerFailed(Exception):
    """A tool that gave no file: the words for its row."""


def quantized(peer: Peer, job: Job, cache: Cache, limit: float) -> Emitted:
    """The file that ``peer`` makes of the job, within ``limit`` seconds; raises `PeerFailed` where there is none."""
    installed = peer.installed
    if installed is None:
        raise PeerFailed(f"not installed: pip install {peer.package}")
    source = (BENCHMARKS / "peer_adapters" / f"{peer.adapter}.py").read_bytes()
    key = {
        "peer": peer.name, "setting": peer.setting, "version": installed, "source": sha256(source).hexdigest(),
        "network": sha256(job.onnx.read_bytes()).hexdigest(), "images": digest_arrays(job.images, job.labels),
        "eps": job.eps,
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray[Any, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            own = replace(job, out=Path(folder), setting=peer.setting)
            run_adapter(peer.adapter, own, limit)
            facts = (own.out / FACTS).read_bytes()
            return {"file": np.frombuffer(own.file.read_bytes(), np.uint8), "facts": np.frombuffer(facts, np.uint8)}

    found = cache.arrays("peers", key, compute)
    return Emitted(found["file"].tobytes(), json.loads(found["facts"].tobytes()))


def run_adapter(adapter: str, job: Job, limit: float) -> None:
    """Let the adapter do the job; raises `PeerFailed` where it crashes, takes too long or writes no file."""
    write_job(job)
    command = [sys.executable, "-m", f"peer_adapters.{adapter}", str(job.out)]
    places = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, cwd=job.out, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"failed: no end after {limit:.0f} s") from None
    if done.returncode or not job.file.exists():
        raise PeerFailed(f"failed: {last_line(done.stderr) or f'ended with {done.returncode}'}")


def last_line(text: str, longest: int = 160) -> str:
    """The last line with words, cut, without what Markdown would take for the end of a cell."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:longest] if lines else ""
