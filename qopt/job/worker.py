"""A worker: another machine's share of a search that measures plans.

What to work on it learns from the study; what could run code it takes from its own command line alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from qopt import __version__
from qopt.cache import Cache, code_digest
from qopt.config import Options, resolve_options
from qopt.data import Data, load_data
from qopt.errors import QoptError, UsageError
from qopt.graph.load import load_model
from qopt.job.optimize import Task, start
from qopt.job.run import Progress, Run
from qopt.job.shards import Bench
from qopt.job.sharing import identity
from qopt.search.crew import serve
from qopt.search.queue import Queue
from qopt.search.storage import shown


@final
@dataclass(frozen=True)
class Own:
    """What a worker was given on its own command line, in place of what the study names.

    Attributes:
        model: path of the model.
        data: as `qopt.data.load_data` takes it.
        factory: ``package.module:name`` of the network that a state dict belongs to.
        trust: load formats that can run code.
    """

    model: str | None = None
    data: str | None = None
    factory: str | None = None
    trust: bool = False


def work(storage: str, study: str, own: Own, cache: Cache, progress: Progress, *, idle: float | None = None) -> int:
    """Measure parts of plans until the run has ended; returns how many.

    Args:
        storage: URL of the storage.
        study: name of the study. With ``idle`` it is waited for.
        own: what is given here.
        cache: keeps expensive evaluations by content.
        progress: told the name of each step.
        idle: seconds without work after which the worker ends; None waits for the run's end.

    Raises:
        UsageError: the storage does not answer, there is no such study, or model, data or version differ from those of
            the run.
        KeyboardInterrupt: the user stopped the worker; what it had taken is back in the queue.
    """
    queue = _joined(storage, study, idle, progress)
    try:
        bench = _prepared(queue.about, own, cache, progress)
        progress("measured search")
        return serve(queue, bench, idle, lambda words: progress(f"measured search: {words}"))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("what this worker had taken is back in the queue") from stop
    finally:
        queue.close()


def _prepared(about: Mapping[str, Any], own: Own, cache: Cache, progress: Progress) -> Bench:
    """Raises UsageError where anything that results depend on differs from the run's."""
    _check_version(about)
    bench = Bench(rebuilt(about, own, cache, progress))
    if bench.digest != about.get("conditions"):
        raise UsageError("the conditions of measuring differ from the run's", where="--study", fix="start both anew")
    return bench


def rebuilt(about: Mapping[str, Any], own: Own, cache: Cache, progress: Progress) -> Run:
    """The run that a study is about.

    Raises:
        UsageError: what it names is not here or needs what only the command line may give, or model or data differ.
    """
    options = _options(about)
    graph, name = _model(about, own)
    axes = {str(axis): int(size) for axis, size in (about.get("axes") or {}).items()}
    run = start(Task(graph, name, _data(about, own), options, axes=axes), cache, progress)
    found = identity(run)
    for word, option in (("model digest", "--model"), ("data digest", "--data")):
        if found[word] != about.get(word):
            raise UsageError(
                f"another {option[2:]} than the run's", where=option, expected=str(about.get(word))[:12],
                got=found[word][:12] or "none", fix="give the same file",
            )  # fmt: skip
    return run


def _joined(storage: str, study: str, idle: float | None, progress: Progress) -> Queue:
    if idle:
        progress("wait for the study")
    queue = Queue.join(storage, study, wait=idle or 0.0)
    if queue is None:
        raise UsageError(
            "no such study", where=shown(storage), got=repr(study),
            fix="start qopt optimize with this --storage and --study first, or give --idle SECONDS to wait for it",
        )  # fmt: skip
    return queue


def _check_version(about: Mapping[str, Any]) -> None:
    ours = {"version": __version__, "code": code_digest()}
    for word, what in (("version", "version of qopt"), ("code", "build of qopt, torch, NumPy or ONNX Runtime")):
        if about.get(word) != ours[word]:
            raise UsageError(
                f"the run has another {what}", where="qopt worker", expected=str(about.get(word))[:12],
                got=ours[word][:12], fix="install the same on every machine",
            )  # fmt: skip


def _options(about: Mapping[str, Any]) -> Options:
    stored = about.get("options")
    if not isinstance(stored, Mapping):
        raise UsageError("the study does not say what to work on", where="--study", fix="start the run anew")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    return resolve_options(**fields)


def _model(about: Mapping[str, Any], own: Own) -> tuple[Any, str]:
    """The network and its name.

    Raises:
        UsageError: a path, factory or trust that the worker has to be given.
        ModelError: as `load_model` raises it.
    """
    path = own.model or about.get("model")
    if not isinstance(path, str):
        raise UsageError("the run's model is no file", where="qopt worker", fix="give --model")
    for word, given in (("factory", own.factory), ("trust", own.trust)):
        if about.get(word) and not given:
            raise UsageError(
                "the run's model is loaded by code, which the worker must be told to run", where=path,
                fix=f"give --{word} here too",
            )  # fmt: skip
    shape = tuple(int(size) for size in about.get("input_shape") or ())
    try:
        return load_model(Path(path), factory=own.factory, trust=own.trust, input_shape=shape or None), Path(path).stem
    except QoptError as error:
        if own.model is None and not Path(path).exists():
            raise UsageError("the run's model is not here", where=path, fix="give --model") from error
        raise


def _data(about: Mapping[str, Any], own: Own) -> Data:
    """The images; those that code makes only where the worker's own command line names it.

    Raises:
        UsageError: not here, or made by code.
    """
    if own.data is not None:
        return load_data(own.data)
    source = about.get("data")
    if not isinstance(source, str) or not Path(source).exists():
        made = isinstance(source, str) and ":" in source
        what = "the run's data is made by code, or not here" if made else "the run's data is not here"
        raise UsageError(what, where=str(source or "qopt worker"), fix="give --data")
    return load_data(str(Path(source).absolute()))
