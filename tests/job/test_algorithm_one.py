"""The lazy route of Algorithm 1 takes what the whole table of norms would, and computes little of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qopt
from qopt.cache import Cache
from qopt.config import Options
from qopt.job.algorithm_one import narrowed
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.space import build_space, capable
from qopt.lipschitz.lazy import LazyNorm
from qopt.search.lipschitz import LipschitzSearch, choose
from qopt.spec import WeightSpec

NETWORK = """g (float[n, 4, 6, 6] x) => (float[n, 5] y) {
    a = Conv <pads = [1,1,1,1], group = 2> (x, w1)
    b = Relu (a)
    c = Conv <strides = [2,2]> (b, w2)
    d = Relu (c)
    e = Flatten (d)
    y = MatMul (e, w3)
}"""
SHAPES = {"w1": (6, 2, 3, 3), "w2": (8, 6, 3, 3), "w3": (32, 5)}
FORMATS = LipschitzSearch().candidates(())


def run_of(model: ir.Model, cache: Cache | None = None) -> Run:
    return start(Task(model, "network", None, Options(search="lipschitz")), cache or Cache(None), lambda step: None)


@pytest.fixture
def networks(text_model: Callable[..., onnx.ModelProto]) -> Callable[[float, int], ir.Model]:
    """A network with grouped convolutions and a matrix stored by inputs, its weights of a given size."""

    def build(scale: float, seed: int) -> ir.Model:
        chance = np.random.default_rng(seed)
        arrays = {
            name: (scale * chance.standard_normal(shape) * 10 ** chance.uniform(-1, 1)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        return ir.from_proto(text_model(NETWORK, **arrays))

    return build


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.1, 0.5, 2.0, 50.0])
def test_it_takes_what_the_table_takes(networks: Callable[[float, int], ir.Model], scale: float, seed: int) -> None:
    run = run_of(networks(scale, seed))
    space = build_space(run, capable(run, FORMATS), measured=False)
    expected = {layer.layer: (choose(layer)[0].spec,) for layer in space.layers}
    assert narrowed(run, capable(run, FORMATS)) == expected


def test_on_the_example_few_norms_are_computed(example_model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two norms for each of 16 formats."""
    computed, bound = [0], LazyNorm.__dict__["bound"].fget

    def counted(self: LazyNorm) -> object:
        computed[0] += self._bound is None
        return bound(self)

    monkeypatch.setattr(LazyNorm, "bound", property(counted))
    run = run_of(example_model)
    found = narrowed(run, capable(run, FORMATS))
    assert computed[0] < 0.2 * 2 * len(FORMATS) * len(found)
    space = build_space(run, capable(run, FORMATS), measured=False)
    assert found == {layer.layer: (choose(layer)[0].spec,) for layer in space.layers}


def test_a_method_that_the_target_rules_out_leaves_the_table(networks: Callable[[float, int], ir.Model]) -> None:
    run = run_of(networks(0.1, 0))
    linear = {name: tuple(s for s in specs if s.kind == "int") for name, specs in capable(run, FORMATS).items()}
    assert narrowed(run, linear) == linear


def test_the_answer_is_kept_by_content(networks: Callable[[float, int], ir.Model], tmp_path: Path) -> None:
    first, again = (Cache(tmp_path) for _ in range(2))
    found = [narrowed(run, capable(run, FORMATS)) for run in (run_of(networks(0.1, 0), c) for c in (first, again))]
    assert found[0] == found[1]
    assert "algorithm-1" not in first.hits
    assert again.hits.count("algorithm-1") == len(SHAPES)


def test_the_strategy_uses_it(example_onnx: Path) -> None:
    bundle = qopt.optimize(example_onnx, search="lipschitz")
    assert "thresholds of Algorithm 1" in bundle.manifest["seconds"]
    run = run_of(qopt_model(example_onnx))
    table = LipschitzSearch()(build_space(run, capable(run, FORMATS), measured=False))
    assert {name: WeightSpec.parse(text) for name, text in bundle.plan.weights.items()} == table.specs
    assert bundle.plan.reasons == table.reasons


def qopt_model(path: Path) -> ir.Model:
    from qopt.graph.load import load_model

    return load_model(path)


def test_weights_that_stay_in_their_file_are_not_held(
    networks: Callable[[float, int], ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(networks(0.1, 0))
    monkeypatch.setattr(Run, "streamed", property(lambda self: True))
    candidates = capable(replace(run), FORMATS)
    assert narrowed(run, candidates) == candidates
