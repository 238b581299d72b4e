"""Plans measured in parts: the same numbers as in whole, in any process; and what a worker refuses to measure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data, load_data
from qopt.errors import PlanError, QoptError, UsageError
from qopt.graph.load import load_model
from qopt.job.choose import _base
from qopt.job.evaluation import Evaluator
from qopt.job.journal import Journal
from qopt.job.judge import Judge
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.shards import ATTACKED, PASSED, Bench, Shard
from qopt.job.sharing import Sharing, check_storage, shared
from qopt.job.worker import Own, _prepared, rebuilt, work
from qopt.limits import Limit
from qopt.measure.network import TwinClassifier
from qopt.plan import Plan
from qopt.search.evaluation import Evaluation
from qopt.search.pieces import Piece
from qopt.search.queue import Queue
from qopt.spec import WeightSpec

pytestmark = pytest.mark.long

FEW = Options(
    robust=True, probe_images=140, calibration_images=64, baselines=(), limits=(Limit("bits", 3.0),), effort="fast",
    rows="off",
)  # fmt: skip


@pytest.fixture(scope="module")
def begin(example_model: ir.Model, fashion: Data) -> Callable[..., Run]:
    def begin(**changes: Any) -> Run:
        task = Task(example_model, "example", fashion, replace(FEW, **changes))
        return start(task, Cache(None), lambda step: None)

    return begin


@pytest.fixture(scope="module")
def run(begin: Callable[..., Run]) -> Run:
    return begin()


@pytest.fixture(scope="module")
def bench(run: Run) -> Bench:
    return Bench(run)


@pytest.fixture(scope="module")
def plan(run: Run) -> Plan:
    return _base(run).with_changes(weights={layer.name: "int3" for layer in run.prepared.layers})


@pytest.fixture(scope="module")
def results(bench: Bench, plan: Plan) -> list[Mapping[str, Any]]:
    return [bench.measure(plan, shard) for shard in bench.shards]


def test_parts_cover_the_images_once(bench: Bench) -> None:
    judge = bench._judge
    assert len(judge.clean.images) == 140
    assert ATTACKED < len(judge.labels) < 140
    assert bench.shards == (
        Shard("passes", 0, 140), Shard("attack", 0, ATTACKED), Shard("attack", ATTACKED, len(judge.labels)),
    )  # fmt: skip
    assert PASSED % ATTACKED == 0


def test_parts_add_up_to_the_whole(bench: Bench, plan: Plan, run: Run, results: list[Mapping[str, Any]]) -> None:
    """As `Judge` measures the plan in one go, up to the rounding of other batches."""
    applied = run.quantizer.apply(plan)
    twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
    judge = Judge.of(run)
    whole, found = judge.evaluation(run, applied, twin, judge.examples(twin)), bench.evaluation(results)
    assert (found.clean, found.code_bits, found.bytes) == (whole.clean, whole.code_bits, whole.bytes)
    assert found.robust == pytest.approx(whole.robust, rel=1e-5)


def test_the_mean_is_over_images_not_over_parts(bench: Bench) -> None:
    passes, first, second = bench.shards
    sizes = {"code_bits": 3.0, "bytes": 10}
    parts = [{"clean": 0.5, "transferred": 0.1, **sizes}, {"attack": 1.0}, {"attack": 4.0}]
    counts = [first.stop - first.start, second.stop - second.start]
    mean = (1.0 * counts[0] + 4.0 * counts[1]) / sum(counts)
    share = bench._judge.share
    found = bench.evaluation(parts)
    assert found == Evaluation(0.5, found.robust, 3.0, 10)
    assert found.robust == pytest.approx(share * mean)
    parts[0] = {**parts[0], "transferred": 9.0}
    assert bench.evaluation(parts).robust == pytest.approx(share * 9.0)
    assert passes.part == "passes"


def test_images_have_the_same_random_starts_in_any_part(bench: Bench, plan: Plan) -> None:
    """The part from image 100 on attacks image 100 from where the whole attacks it."""
    part, whole = bench.shards[-1], Shard("attack", 0, bench.shards[-1].stop)
    alone = bench.measure(plan, part)["attack"] * (part.stop - part.start)
    before = bench.measure(plan, replace(whole, stop=part.start))["attack"] * part.start
    both = bench.measure(plan, whole)["attack"] * whole.stop
    assert alone + before == pytest.approx(both, rel=1e-5)


def test_a_run_without_workers_measures_the_same_parts(
    run: Run, bench: Bench, plan: Plan, results: list[Mapping[str, Any]]
) -> None:
    evaluator = Evaluator(run, _base(run), Journal())
    (found,) = evaluator([{layer.name: WeightSpec.parse("int3") for layer in run.prepared.layers}])
    same = plan.with_changes(bias_correction=evaluator._base.bias_correction, rounding=evaluator._base.rounding)
    assert found == bench.evaluation([bench.measure(same, shard) for shard in bench.shards])
    if same == plan:
        assert found == bench.evaluation(results)


def test_through_the_queue_every_bit_stays(bench: Bench, plan: Plan, results: list[Mapping[str, Any]]) -> None:
    """Pieces and results are plain JSON, whatever process reads them."""
    for piece, expected in zip(bench.pieces(plan, "plan 1"), results, strict=True):
        sent = Piece(piece.key, piece.group, json.loads(json.dumps(dict(piece.work))))
        found = Bench(bench._run)(sent)
        assert json.loads(json.dumps(dict(found))) == dict(expected)


def test_nothing_attacked_is_one_part(begin: Callable[..., Run]) -> None:
    bench = Bench(begin(robust=False))
    plan = _base(bench._run).with_changes(weights={layer.name: "int2" for layer in bench._run.prepared.layers})
    assert bench.shards == (Shard("passes", 0, 140),)
    found = bench.evaluation([bench.measure(plan, bench.shards[0])])
    assert found.robust is None
    assert found.clean > 0


def test_keys_are_of_content(begin: Callable[..., Run], bench: Bench, plan: Plan) -> None:
    """Plan, part, range and conditions each count; reasons and names do not."""
    keys = {piece.key for piece in bench.pieces(plan, "a")}
    assert len(keys) == len(bench.shards)
    assert {piece.key for piece in bench.pieces(plan.with_changes(reasons={"x": "y"}), "b")} == keys
    others = [bench.pieces(plan.with_changes(rounding="gptq"), "a")]
    others += [Bench(begin(**change)).pieces(plan, "a") for change in ({"seed": 1}, {"eps": 0.2})]
    for pieces in others:
        assert not keys & {piece.key for piece in pieces}


def test_a_plan_stays_real_until_the_next(bench: Bench, plan: Plan) -> None:
    bench.measure(plan, bench.shards[0])
    assert bench.ready == {plan.digest}
    real = bench._real
    bench.measure(plan, bench.shards[1])
    assert bench._real is real
    other = plan.with_changes(weights={layer.name: "int2" for layer in bench._run.prepared.layers})
    bench.measure(other, bench.shards[0])
    assert bench.ready == {other.digest}


GARBLED: list[list[dict[str, Any]]] = [
    [{}, {}, {}],
    [{"clean": "x", "transferred": 0, "code_bits": 1, "bytes": 1}, {"attack": 0}, {"attack": 0}],
    [{"clean": 0, "transferred": float("nan"), "code_bits": 1, "bytes": 1}, {"attack": 0}, {"attack": 0}],
    [{"clean": 0, "transferred": 0, "code_bits": None, "bytes": 1}, {"attack": 0}, {"attack": 0}],
    [{"clean": 0, "transferred": 0, "code_bits": 1, "bytes": 1}],
]


@pytest.mark.parametrize("garbled", GARBLED)
def test_results_that_are_none_are_refused(bench: Bench, garbled: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="the storage holds a result that is none"):
        bench.evaluation(garbled)


@pytest.mark.parametrize(
    "change", [{"stop": 7}, {"part": "other"}, {"plan": {}}, {"plan": None}, {"plan": {"schema": 1}}]
)
def test_pieces_that_are_none_are_refused(bench: Bench, plan: Plan, change: dict[str, Any]) -> None:
    piece = bench.pieces(plan, "plan 1")[0]
    with pytest.raises(PlanError):
        bench(replace(piece, work={**piece.work, **change}))


def silent(step: str) -> None:
    del step


@pytest.fixture(scope="module")
def place(example_onnx: Path, fashion: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, images, and a storage where a coordinator has begun the study s."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "model.onnx").write_bytes(example_onnx.read_bytes())
    both = (fashion.calibrate, fashion.select)
    arrays = {"x_train": np.concatenate([part.images for part in both]), "x_test": fashion.report.images}
    arrays |= {"y_train": np.concatenate([part.labels for part in both]), "y_test": fashion.report.labels}
    np.savez(folder / "images.npz", **arrays)  # type: ignore[arg-type]
    np.savez(folder / "others.npz", **{name: array[::-1] for name, array in arrays.items()})  # type: ignore[arg-type]
    source = {"model": str(folder / "model.onnx"), "data": str(folder / "images.npz"), "axes": {}, "input_shape": []}
    graph, data = load_model(folder / "model.onnx"), load_data(str(folder / "images.npz"))
    run = start(Task(graph, "model", data, replace(FEW, probe_images=32)), Cache(folder / "cache"), silent)
    sharing = Sharing(f"sqlite:///{folder}/queue.db", "s", {**source, "factory": False, "trust": False})
    sharing.begin(run, Bench(run)).close()
    return folder


@pytest.fixture
def queue(place: Path) -> Iterator[Queue]:
    queue = Queue.join(f"sqlite:///{place}/queue.db", "s")
    assert queue is not None
    yield queue
    queue.close()


def test_a_worker_rebuilds_the_run_and_measures_the_same(place: Path, queue: Queue) -> None:
    about = queue.about
    run = rebuilt(about, Own(), Cache(place / "cache"), silent)
    bench = Bench(run)
    assert run.options == replace(FEW, probe_images=32, gates=run.options.active_gates)
    assert bench.digest == about["conditions"]
    plan = _base(run).with_changes(weights={layer.name: "int3" for layer in run.prepared.layers})
    pieces = bench.pieces(plan, "plan 1")
    queue.put(pieces)
    said: list[str] = []
    assert work(queue.url, "s", Own(), Cache(place / "cache"), said.append, idle=0.1) == len(pieces) == 2
    found = queue.results()
    assert bench.evaluation([found[piece.key] for piece in pieces]) == bench.evaluation(
        [bench.measure(plan, shard) for shard in bench.shards]
    )
    assert [words for words in said if "plan 1" in words] == [
        "measured search: pass of images 0 to 32, plan 1",
        f"measured search: attack on images 0 to {bench.shards[1].stop}, plan 1",
    ]


REFUSED: dict[str, tuple[dict[str, Any], Own, str]] = {
    "version": ({"version": "0"}, Own(), "qopt worker: the run has another version of qopt (expected 0, got "),
    "code": ({"code": "0" * 64}, Own(), "qopt worker: the run has another build of qopt, torch, NumPy or ONNX Runtime"),
    "model": ({"model digest": "0" * 64}, Own(), "--model: another model than the run's (expected 000000000000, got "),
    "data": ({"data digest": "0" * 64}, Own(), "--data: another data than the run's (expected 000000000000, got "),
    "own data": ({}, Own(data="{}/others.npz"), "--data: another data than the run's (expected "),
    "conditions": ({"conditions": "0"}, Own(), "--study: the conditions of measuring differ from the run's; start"),
    "no model": ({"model": None}, Own(), "qopt worker: the run's model is no file; give --model"),
    "gone model": ({"model": "gone.onnx"}, Own(), "gone.onnx: the run's model is not here; give --model"),
    "own gone": ({}, Own(model="own.onnx"), "own.onnx: "),
    "no data": ({"data": None}, Own(), "qopt worker: the run's data is not here; give --data"),
    "gone data": ({"data": "gone.npz"}, Own(), "gone.npz: the run's data is not here; give --data"),
    "code as data": (
        {"data": "planted:data"},
        Own(),
        "planted:data: the run's data is made by code, or not here; give",
    ),
    "factory": (
        {"factory": True},
        Own(),
        "model.onnx: the run's model is loaded by code, which the worker must be",
    ),
    "trust": (
        {"trust": True},
        Own(),
        "model.onnx: the run's model is loaded by code, which the worker must be",
    ),
    "no options": ({"options": None}, Own(), "--study: the study does not say what to work on; start the run anew"),
    "odd options": ({"options": {"code": "x"}}, Own(), "unknown option (got 'code')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_from_the_run_is_refused(
    place: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, own, words = REFUSED[case]
    monkeypatch.chdir(place)
    (place / "planted.py").write_text("raise SystemExit('ran')")
    own = replace(own, data=None if own.data is None else own.data.format(place))
    with pytest.raises(QoptError) as caught:
        _prepared({**queue.about, **change}, own, Cache(place / "cache"), silent)
    assert words in str(caught.value)
    assert "planted" not in sys.modules


def test_what_code_makes_is_taken_from_the_workers_own_command_line(
    place: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "making.py").write_text("import numpy\n\n\ndef data():\n    return dict(numpy.load('images.npz'))\n")
    about = {**queue.about, "data": "making:data"}
    run = rebuilt(about, Own(data="making:data"), Cache(place / "cache"), silent)
    assert run.data is not None
    assert run.data.digest == about["data digest"]


def test_no_study_no_worker(place: Path) -> None:
    url = f"sqlite:///{place}/queue.db"
    for idle in (None, 0.1):
        with pytest.raises(UsageError, match=r"no such study \(got 't'\); start qopt optimize with this --storage"):
            work(url, "t", Own(), Cache(None), silent, idle=idle)


def test_only_searches_that_measure_are_shared(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    for search, planned, got in (("greedy", False, "--search greedy"), ("refit", True, "--plan")):
        with pytest.raises(UsageError, match=f"only the plans that a search measures are shared .got {got}."):
            check_storage(url, search, planned=planned)
    assert not list(tmp_path.iterdir())
    check_storage(url, "refit", planned=False)


def test_workers_may_go_when_the_block_ends_however_it_does(run: Run, place: Path) -> None:
    url = f"sqlite:///{place}/ended.db"
    sharing = Sharing(url, "s", {})

    def fails() -> None:
        with shared(sharing):
            sharing.begin(run, Bench(run))
            joined = Queue.join(url, "s")
            assert joined is not None
            assert not joined.finished
            joined.close()
            raise ValueError

    with pytest.raises(ValueError):
        fails()
    after = Queue.join(url, "s")
    assert after is not None
    assert after.finished
    after.close()
    sharing.finish()  # again, with nothing left to end
