"""Measuring a plan in parts that any process can do: each is about some of the images, and their sum is the plan's.

A run on one machine does the same parts in the same order, so that its results are those of many machines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal, final

from qopt.cache import code_digest, digest_arrays
from qopt.errors import PlanError, UsageError
from qopt.job.judge import Judge
from qopt.job.run import PROBE_STEPS, Run
from qopt.measure.divergence import Probe
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import BATCH
from qopt.plan import Plan
from qopt.quantize import Applied
from qopt.search.evaluation import Evaluation
from qopt.search.pieces import Piece, Result
from qopt.size import code_bits, stored_bytes

ATTACKED: Final = BATCH
"""Images in a part that attacks a plan's own twin, at most; a whole batch of the attack."""

PASSED: Final = 8 * BATCH
"""Images in a part that runs clean and transferred images through it, at most: about as much work."""


@final
@dataclass(frozen=True)
class Shard:
    """A part of measuring a plan: images ``start`` to ``stop`` (exclusive) of those that the part is about.

    ``passes`` runs all images as they are and as the attack on float left them; ``attack`` attacks the plan's twin on
    those that float withstands.
    """

    part: Literal["passes", "attack"]
    start: int
    stop: int


@final
class Bench:
    """Where plans of one run are made real and measured, in whole or in parts: a `Workshop` for a queue.

    Args:
        run: a run with images.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._real: tuple[str, Applied, TwinClassifier] | None = None

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The parts of every plan, in the order in which they are summed."""
        judge = self._judge
        passes = [Shard("passes", *ends) for ends in _ranges(len(judge.clean.images), PASSED)]
        return (*passes, *(Shard("attack", *ends) for ends in _ranges(self._attacked, ATTACKED)))

    @cached_property
    def conditions(self) -> Mapping[str, Any]:
        """What measurements depend on beside the plan."""
        run = self._run
        assert run.data is not None
        few = run.data.select.first(run.probe_images)
        calibration = run.quantizer.calibration
        return {
            "model": run.prepared.digest, "images": digest_arrays(few.images, few.labels),
            "calibration": "" if calibration is None else digest_arrays(calibration.numpy()),
            "threat": [run.threat.norm, run.threat.eps] if run.options.robust else [], "steps": PROBE_STEPS,
            "seed": run.options.seed, "normalisation": [run.options.mean, run.options.std],
        }  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `conditions` and of the program."""
        return _digest([code_digest(), dict(self.conditions)])

    @property
    def ready(self) -> Set[str]:
        """The digest of the plan that is real, if one is."""
        return frozenset() if self._real is None else frozenset({self._real[0]})

    def pieces(self, plan: Plan, name: str) -> list[Piece]:
        """The parts of a plan as work for a queue; ``name`` is for messages."""
        content = plan.model_dump(by_alias=True, exclude={"reasons"})
        parts = [asdict(shard) for shard in self.shards]
        return [
            Piece(_digest([self.digest, plan.digest, part]), plan.digest, {"name": name, "plan": content, **part})
            for part in parts
        ]

    def __call__(self, piece: Piece) -> Result:
        """Do one part of a plan for a queue; PlanError where it is not what `pieces` makes."""
        work = piece.work
        plan = Plan.from_json(json.dumps(work.get("plan")), "the queue")
        shard = next((one for one in self.shards if all(work.get(k) == v for k, v in asdict(one).items())), None)
        if shard is None or plan.digest != piece.group:
            raise PlanError("not a part of measuring a plan", where="the queue", got=f"{work.get('part')}")
        what = "attack on" if shard.part == "attack" else "pass of"
        self._run.progress(f"measured search: {what} images {shard.start} to {shard.stop}, {work.get('name')}")
        return self.measure(plan, shard)

    def measure(self, plan: Plan, shard: Shard) -> Result:
        """Means over the shard's images: divergences in nats; for ``passes`` the plan's size too."""
        applied, twin = self._made_real(plan)
        part, judge = slice(shard.start, shard.stop), self._judge
        if shard.part == "attack":
            made = judge.examples(twin, part)
            assert judge.held is not None
            assert made is not None
            return {"attack": Probe(made, judge.held.reference[part]).divergence(twin)}
        stored = list(applied.quantized.stored(self._run.prepared))
        sizes = {"code_bits": code_bits(stored), "bytes": stored_bytes(stored)}
        probes = {"clean": judge.clean, "transferred": judge.transferred}
        few = {name: Probe(p.images[part], p.reference[part]) for name, p in probes.items() if p is not None}
        return {name: probe.divergence(twin) for name, probe in few.items() if len(probe.images)} | sizes

    def evaluation(self, results: Sequence[Result]) -> Evaluation:
        """The plan's, from the results of all `shards` in their order.

        Raises:
            UsageError: they are no results.
        """
        try:
            judge, attacked = self._judge, self._attacked
            clean = self._mean(results, "clean", len(judge.clean.images))
            robust = None if judge.transferred is None else 0.0
            if attacked:
                robust = judge.share * max(self._mean(results, name, attacked) for name in ("transferred", "attack"))
            bits, size = float(results[0]["code_bits"]), int(results[0]["bytes"])
        except (LookupError, TypeError, ValueError) as error:
            raise UsageError("the storage holds a result that is none", got=str(error), fix="use another") from error
        return Evaluation(clean, robust, bits, size)

    def _mean(self, results: Sequence[Result], name: str, count: int) -> float:
        """Over ``count`` images, of the means of the shards; with one shard its own, to the last bit."""
        part = "attack" if name == "attack" else "passes"
        rows = [(shard, found) for shard, found in zip(self.shards, results, strict=True) if shard.part == part]
        means = [(float(row[name]), min(s.stop, count) - s.start) for s, row in rows if s.start < count]
        if not all(math.isfinite(mean) for mean, _ in means):
            raise ValueError(f"{name} that is not finite")
        return means[0][0] if len(means) == 1 else math.fsum(mean * some for mean, some in means) / count

    def _made_real(self, plan: Plan) -> tuple[Applied, TwinClassifier]:
        """The plan made real; the last one is kept, for to make it again GPTQ would have to run again."""
        if self._real is None or self._real[0] != plan.digest:
            self._real = None
            applied = self._run.quantizer.apply(plan)
            twin = TwinClassifier(applied.graph, self._run.normalisation, self._run.prepared.batch)
            self._real = plan.digest, applied, twin
        return self._real[1:]

    @property
    def _attacked(self) -> int:
        """On how many images the twin of a plan is attacked."""
        return 0 if self._judge.held is None else len(self._judge.labels)

    @cached_property
    def _judge(self) -> Judge:
        return Judge.of(self._run)


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
