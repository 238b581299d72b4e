"""Run files as whoever gets them will: in a process of its own, with nothing loaded but numpy and ONNX Runtime.

This file is that process, started by its path with a folder (`qopt.runtime.process` fills it), so it imports no other
module of qopt. It reads ``job.json`` and ``inputs.npz`` there and writes ``result.json``, ``outputs.npz`` and the graph
that ONNX Runtime made of the checked file, ``optimized.onnx``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

OPTIMIZED: Final = "optimized.onnx"
"""The graph after ONNX Runtime's optimisation; its larger tensors lie beside it and are not looked at."""

MOST_ROUNDS: Final = 50
FEWEST_ROUNDS: Final = 3


def session_options(threads: int = 1, optimized: Path | None = None, *, lean: bool = False) -> Any:
    """Options of a quiet CPU session; ``optimized`` names a file that receives the optimised graph.

    A ``lean`` session folds and packs nothing and gives memory back at once: it runs the nodes as the file has them,
    and never holds all weights in float.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # DequantizeLinear + MatMul becomes MatMulNBits, which by default quantizes activations to int8 unasked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if lean:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return options


def open_file(path: Path, optimized: Path | None = None, *, lean: bool = False) -> Any:
    """A session of the file at ``path`` on one thread."""
    options = session_options(optimized=optimized, lean=lean)
    if optimized is not None:
        entries = {"file_name": f"{optimized.name}.data", "min_size_in_bytes": "1024"}
        for key, value in entries.items():
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def flat(outputs: list[Any]) -> list[Any]:
    """All arrays in order, those of a sequence in the place of the sequence."""
    return [np.asarray(part) for value in outputs for part in (value if isinstance(value, list) else [value])]


def fastest(calls: dict[str, Any], seconds: float) -> dict[str, float]:
    """The shortest time of every call in seconds, in turns, until ``seconds`` are over and three rounds are made."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    for number in range(MOST_ROUNDS):
        if number >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        time_round(calls, best)
    return best


def time_round(calls: Mapping[str, Callable[[], object]], best: dict[str, float]) -> None:
    """Make every call once, in turn, and lower its time in ``best`` where it was shorter."""
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        best[name] = min(best[name], time.perf_counter() - began)


def main(folder: Path) -> None:
    """Do the job in ``folder``: the first file is checked, all are timed on the first ``items`` of every input.

    A ``lean`` job checks in a lean session and times nothing.
    """
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "inputs.npz", allow_pickle=False) as stored:
        feeds = {name: stored[f"input_{number}"] for number, name in enumerate(job["inputs"])}
    first = {name: array[: job["items"]] if job["items"] else array for name, array in feeds.items()}
    calls: dict[str, Any] = {}
    for number, (name, file) in enumerate(job["files"].items()):
        session = open_file(folder / file, None if number or job["lean"] else folder / OPTIMIZED, lean=job["lean"])
        wanted = [value.name for value in session.get_inputs()]
        if not number:
            outputs = flat(session.run(None, {key: feeds[key] for key in wanted}))
            np.savez(folder / "outputs.npz", **{f"output_{i}": array for i, array in enumerate(outputs)})
        if job["lean"]:
            break
        calls[name] = partial(session.run, None, {key: first[key] for key in wanted})
        calls[name]()
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(job["watched"]))
    result = {"seconds": fastest(calls, job["seconds"]), "loaded": loaded}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
