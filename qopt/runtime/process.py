"""Files in a fresh Python process: their outputs, kernels, sizes and latency there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import VerificationError
from qopt.runtime import fresh
from qopt.runtime.kernels import Kernels, kernels_in

TIMED: Final = 0.3
"""Seconds for which files are run in turn to find the shortest time of each; three rounds at least."""

LONGEST: Final = 1800.0
"""Seconds after which the process counts as hung."""

FOREIGN: Final = ("torch", "onnx", "onnx_ir", "qopt")
"""Modules that a user of the file need not have: none of them may be loaded there."""


@final
@dataclass(frozen=True, eq=False)
class FreshRun:
    """What a fresh process found.

    Attributes:
        outputs: of the first file, the parts of sequences in their place.
        kernels: what ONNX Runtime runs for the first file.
        bytes: name to the size of the file, with the data beside it.
        seconds: name to the shortest time of one run on ``items`` items.
    """

    outputs: tuple[NDArray[Any], ...]
    kernels: Kernels
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]


def run_fresh(
    files: Mapping[str, Mapping[str, bytes]],
    feeds: Mapping[str, NDArray[Any]],
    *,
    items: int | None,
    seconds: float = TIMED,
    lean: bool = False,
) -> FreshRun:
    """Load ``files`` in one fresh process, run the first on ``feeds`` and time all of them.

    Args:
        files: name of a network to its files by name, the model first.
        feeds: inputs by name.
        items: how many items of each input's first axis a timed run takes; None for all.
        seconds: how long to time.
        lean: run the first in a lean session, see `session_options`: kernels are those of the file as it is, and
            nothing is timed.

    Raises:
        VerificationError: the process fails, whatever kills it, or loads what the file must not need.
    """
    with tempfile.TemporaryDirectory(prefix="qopt-") as name:
        folder = Path(name)
        paths = {network: _write(folder / f"file_{i}", parts) for i, (network, parts) in enumerate(files.items())}
        arrays: dict[str, Any] = {f"input_{i}": array for i, array in enumerate(feeds.values())}
        np.savez(folder / "inputs.npz", **arrays)
        job = {
            "files": {network: str(path.relative_to(folder)) for network, path in paths.items()},
            "inputs": list(feeds), "items": items or 0, "seconds": seconds, "lean": lean, "watched": list(FOREIGN),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        _start(folder)
        found = json.loads((folder / "result.json").read_text())
        if found["loaded"]:
            raise VerificationError(
                "the fresh process loaded more than ONNX Runtime and numpy", got=", ".join(found["loaded"])
            )
        with np.load(folder / "outputs.npz", allow_pickle=False) as stored:
            outputs = tuple(stored[f"output_{i}"] for i in range(len(stored.files)))
        sizes = {network: sum(p.stat().st_size for p in path.parent.iterdir()) for network, path in paths.items()}
        run = next(iter(paths.values())) if lean else folder / fresh.OPTIMIZED
        return FreshRun(outputs, kernels_in(run), sizes, found["seconds"])


def _write(folder: Path, parts: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(parts))


def _start(folder: Path) -> None:
    """Run `fresh` by its path: ``-P`` keeps its folder, whose modules have common names, off the search path."""
    command = [sys.executable, "-P", fresh.__file__, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LONGEST, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VerificationError("no fresh process could run the file", got=str(error).splitlines()[0]) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        got = lines[-1] if lines else f"exit status {done.returncode}"
        raise VerificationError("the file does not run in a fresh process", got=got)
