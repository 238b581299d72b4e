"""Sharing the measurements of a run among machines: what it tells its workers, and how it gathers their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from qopt import __version__
from qopt.cache import code_digest
from qopt.errors import QoptError, UsageError
from qopt.job.run import Run
from qopt.job.shards import Bench
from qopt.plan import Plan
from qopt.plugins import load
from qopt.search.crew import gather
from qopt.search.evaluation import Evaluation, MeasuredStrategy

if TYPE_CHECKING:
    from qopt.search.queue import Queue


@final
@dataclass(eq=False)
class Sharing:
    """Where a run shares its measurements, and what workers need to know of it.

    Attributes:
        storage: URL of the storage.
        study: name of the study; None for one by the run's name and conditions.
        source: plain JSON, what to load: ``model`` and ``data`` as paths or None, ``input_shape``, ``axes``, and
            whether ``factory`` or ``trust`` are needed.
    """

    storage: str
    study: str | None
    source: Mapping[str, Any]
    _queues: list[Queue] = field(default_factory=list)

    def begin(self, run: Run, bench: Bench) -> Queue:
        """Open the study for a run, and tell workers what it works on."""
        from qopt.search.queue import Queue  # with Optuna, which takes seconds to import
        from qopt.search.storage import shown

        study = self.study or f"{run.name}-{bench.digest[:8]}"
        about = {**self.source, "options": run.options.as_dict(), "conditions": bench.digest, **identity(run)}
        queue = Queue.create(self.storage, study, about)
        self._queues.append(queue)
        run.progress(f"measured search: shared at {shown(self.storage)}, study {study}")
        return queue

    def finish(self) -> None:
        """Tell the workers that the run has ended, if the storage still answers."""
        while self._queues:
            queue = self._queues.pop()
            with suppress(QoptError):
                queue.finish()
            queue.close()


def check_storage(storage: str, search: str, *, planned: bool) -> None:
    """See that there is something to share, and that the storage answers, before anything is computed.

    Raises:
        UsageError: a strategy that measures nothing, a given plan, or a storage that does not answer.
    """
    strategy = load("qopt.searches", search, "--search")()
    if planned or not isinstance(strategy, MeasuredStrategy):
        got = "--plan" if planned else f"--search {search}"
        raise UsageError(
            "only the plans that a search measures are shared", where="--storage", got=got,
            fix="give --search refit or optuna, or leave out --storage",
        )  # fmt: skip
    from qopt.search.storage import close, open_storage  # with Optuna

    opened = open_storage(storage, create=True)
    assert opened is not None
    close(opened)


@contextmanager
def shared(sharing: Sharing | None) -> Iterator[None]:
    """At the end of the block, however it comes, workers may go."""
    try:
        yield
    finally:
        if sharing is not None:
            sharing.finish()


def identity(run: Run) -> dict[str, str]:
    """What a worker's run must have in common with that of the coordinator, by words for messages."""
    return {
        "version": __version__, "code": code_digest(), "model digest": run.prepared.digest,
        "data digest": "" if run.data is None else run.data.digest,
    }  # fmt: skip


@final
class Crew:
    """Measures plans of a run by its queue, which workers and this process empty together.

    Args:
        queue: as `Sharing.begin` opened it.
        bench: of the run.
        said: told what failed or was lost.
    """

    def __init__(self, queue: Queue, bench: Bench, said: Callable[[str], None]) -> None:
        self._queue, self._bench, self._said = queue, bench, said

    def announce(self, plans: Sequence[tuple[str, Plan]]) -> None:
        """Put plans into the queue, by names for messages."""
        self._queue.put([piece for name, plan in plans for piece in self._bench.pieces(plan, name)])

    def evaluation(self, plan: Plan) -> Evaluation:
        """What was measured of an announced plan.

        Raises:
            QoptError: a part of it failed, on several workers or here; or the storage did.
        """
        keys = [piece.key for piece in self._bench.pieces(plan, "")]
        return self._bench.evaluation(gather(self._queue, keys, self._bench, self._said))
