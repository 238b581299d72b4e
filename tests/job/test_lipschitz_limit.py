"""The limit on the Lipschitz constant: potentials against the calculus on plans' own networks, and the main job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper, parser

import qopt
from qopt.cache import Cache
from qopt.certificates.calculus import network_bounds
from qopt.config import resolve_options
from qopt.data import Data, Split
from qopt.errors import InfeasibleError, UnsupportedModelError, UsageError
from qopt.graph.load import load_model
from qopt.job import lipschitz_limit
from qopt.job.lipschitz_limit import LipschitzGraph, lipschitz_graph
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.space import build_space, capable
from qopt.lipschitz import NormBound
from qopt.plan import Defaults, Plan
from qopt.runtime.session import to_bytes
from qopt.search.ceiling import build_ceiling
from qopt.search.items import build_items
from qopt.search.potentials import Edge, Node
from qopt.search.space import Space

pytestmark = pytest.mark.long

HEADER = '<ir_version: 10, opset_import: ["": 21]>\nnet '

NETWORKS = {
    "plain": """(float[n,2,6,6] x, float[4,2,3,3] w1, float[4] b1, float[5,4,3,3] w2, float[4,45] w3, float[4] b3)
            => (float[n,4] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,0,0], strides = [2,2]> (r1, w2)
        r2 = Relu (c2)
        f = Flatten (r2)
        y = Gemm <transB = 1, alpha = 0.5> (f, w3, b3)
    }""",
    "residual": """(float[n,2,5,5] x, float[4,2,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4,2,1,1] w3,
            float[3,4] w4, float[3] b4) => (float[n,3] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w2)
        s = Conv (x, w3)
        a = Add (c2, s)
        r2 = Relu (a)
        g = GlobalAveragePool (r2)
        f = Flatten (g)
        y = Gemm <transB = 1> (f, w4, b4)
    }""",
    "concat": """(float[n,2,4,4] x, float[3,2,1,1] w1, float[2,2,3,3] w2, float[4,5,3,3] w3, float[16,3] w4)
            => (float[n,3] y) {
        c1 = Conv (x, w1)
        c2 = Conv <pads = [1,1,1,1]> (x, w2)
        r2 = Relu (c2)
        j = Concat <axis = 1> (c1, r2)
        c3 = Conv (j, w3)
        r3 = HardSwish (c3)
        f = Flatten (r3)
        y = MatMul (f, w4)
    }""",
    "pools": """(float[n,2,7,7] x, float[4,1,3,3] w1, float[3,4,3,3] w2, float[12,3] w3, float[3] b3)
            => (float[n,3] y) {
        c1 = Conv <pads = [1,1,1,1], group = 2> (x, w1)
        r1 = Sigmoid (c1)
        p1 = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (r1)
        c2 = Conv <pads = [1,1,1,1]> (p1, w2)
        h = Add (c2, c2)
        p2 = AveragePool <kernel_shape = [2,2], strides = [2,2]> (h)
        f = Flatten (p2)
        m = MatMul (f, w3)
        y = Add (m, b3)
    }""",
    "norm": """(float[n,2,4,4] x, float[3,2,3,3] w1, float[3] s, float[3] t, float[3] m, float[3,3,1,1] w2,
            float[3,48] w3) => (float[n,3] y) <float[3] v = {0.3, 1.2, 0.05}> {
        c1 = Conv <pads = [1,1,1,1]> (x, w1)
        r1 = Relu (c1)
        h = BatchNormalization (r1, s, t, m, v)
        r2 = Relu (h)
        a = Add (r1, r2)
        c2 = Conv (a, w2)
        f = Flatten (c2)
        y = Gemm <transB = 1> (f, w3)
    }""",
}

ATTENTION = """(float[n,4,6] x, float[6,6] w1, float[6,6] w2, float[24,3] w3) => (float[n,3] y) {
    q = MatMul (x, w1)
    k = MatMul (x, w2)
    t = Transpose <perm = [0,2,1]> (k)
    s = MatMul (q, t)
    a = Softmax <axis = 2> (s)
    o = MatMul (a, x)
    f = Flatten (o)
    y = MatMul (f, w3)
}"""


def parsed(text: str, seed: int = 0) -> ir.Model:
    """ONNX text to a model; inputs after the first are random weights."""
    proto = parser.parse_model(HEADER + text)
    generator = np.random.default_rng(seed)
    for value in list(proto.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 4.0
        array = (1.5 * generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return ir.serde.deserialize_model(proto)


def started(model: ir.Model, data: Data | None = None, **options: Any) -> Run:
    resolved = resolve_options(**{"limits": ("lipschitz<=1e9",), "target": "int4", **options})
    return start(Task(model, "net", data, resolved), Cache(None), lambda step: None)


def images(run: Run, count: int = 12) -> Data:
    rng = np.random.default_rng(0)

    def part(n: int) -> Split:
        shape = (n, *run.prepared.input_shape)
        labels = rng.integers(0, run.prepared.classes, n)
        return Split(rng.random(shape, dtype=np.float32), labels.astype(np.int64))

    return Data(part(count), part(count), part(count))


def spaced(run: Run) -> tuple[Space, LipschitzGraph]:
    return build_space(run, capable(run, run.target.weights), measured=False), lipschitz_graph(run)


def check(run: Run, seeds: int = 4, most: float = 1.0001) -> None:
    """The potentials of random plans are never below the calculus on the plan's own network, and hardly above."""
    space = spaced(run)[0]
    items = build_items(space)
    ceiling = build_ceiling(space, items)
    assert ceiling is not None
    rng = np.random.default_rng(3)
    activations = "float" if run.data is None else str(run.target.activations)
    for _ in range(seeds):
        picks = [int(rng.integers(len(item.specs))) for item in items]
        weights = {item.layers[0]: str(item.specs[p]) for item, p in zip(items, picks, strict=True)}
        plan = Plan(weights=weights, defaults=Defaults(activations=activations))
        twin = run.quantizer.apply(plan).graph
        exactly = network_bounds(twin, run.prepared.input_shape, "l2").last.lipschitz
        found = math.exp(ceiling.constant(picks))
        assert exactly <= found <= exactly * most
        clean = torch.rand(40, *run.prepared.input_shape, generator=torch.Generator().manual_seed(0))
        if run.data is None:  # a staircase has no constant
            moved = clean + 1e-2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                stretch = (twin(moved) - twin(clean)).norm(dim=1) / (moved - clean).flatten(1).norm(dim=1)
            assert float(stretch.max()) <= found


@pytest.mark.parametrize("name", NETWORKS)
def test_potentials_are_those_of_the_calculus(name: str) -> None:
    check(started(parsed(NETWORKS[name])))


@pytest.mark.parametrize("name", ["residual", "concat"])
def test_quantized_activations_leave_room_for_their_slope(name: str) -> None:
    run = started(parsed(NETWORKS[name]))
    check(started(parsed(NETWORKS[name]), images(run)), seeds=3)


def test_a_network_behind_its_wrapping(example_onnx: Path) -> None:
    check(started(load_model(example_onnx)), seeds=1)


def test_the_graph_names_layers_and_joins() -> None:
    run = started(parsed(NETWORKS["residual"]))
    space, graph = spaced(run)
    nodes = graph.potentials.nodes
    assert set(graph.potentials.layers) == set(graph.uses) == {layer.name for layer in run.prepared.layers}
    assert [len(node.edges) for node in nodes].count(2) == 1
    assert all(node.power == 1 for node in nodes)
    assert all(c.operator is not None for layer in space.layers for c in layer.candidates)
    concat = spaced(started(parsed(NETWORKS["concat"])))[1]
    assert [node.power for node in concat.potentials.nodes if len(node.edges) == 2] == [2]


def test_without_the_limit_nothing_of_it_is_computed() -> None:
    run = started(parsed(NETWORKS["residual"]), limits=())
    space = build_space(run, capable(run, run.target.weights), measured=False)
    assert space.potentials is None
    assert {c.operator for layer in space.layers for c in layer.candidates} == {None}


def test_operator_norms_are_cached_by_content(tmp_path: Path) -> None:
    resolved = resolve_options(limits=("lipschitz<=1e9",), target="int4")
    found = []
    for _ in range(2):
        cache = Cache(tmp_path)
        run = start(Task(parsed(NETWORKS["pools"]), "net", None, resolved), cache, lambda step: None)
        space = build_space(run, capable(run, run.target.weights), measured=False)
        found.append([c.operator for layer in space.layers for c in layer.candidates])
        hits = cache.hits.count("operator-norms-l2")
    assert found[0] == found[1]
    assert hits == len(found[1])


def test_the_norm_of_a_convolution_is_the_operators_not_the_matrixs() -> None:
    layers = {layer.layer: layer for layer in spaced(started(parsed(NETWORKS["residual"])))[0].layers}

    def ratios(name: str) -> list[float]:
        return [c.operator.upper / c.norm.upper for c in layers[name].candidates if c.operator is not None]

    assert min(ratios("w1")) > 1.2
    assert ratios("w4") == pytest.approx([1.0] * len(ratios("w4")))


def test_operators_without_a_constant_are_named() -> None:
    run = started(parsed(ATTENTION))
    message = "node 's': operator MatMul has no Lipschitz constant that a limit could hold; leave out the limit"
    with pytest.raises(UnsupportedModelError, match=message):
        lipschitz_graph(run)


def test_networks_that_take_no_image_are_refused() -> None:
    text = """(int64[n,4] x, float[10,3] e, float[12,3] w) => (float[n,3] y) {
        g = Gather (e, x)
        f = Flatten (g)
        y = MatMul (f, w)
    }"""
    with pytest.raises(UnsupportedModelError, match=r"a Lipschitz limit needs a network .* its input 'x' is INT64"):
        lipschitz_graph(started(parsed(text)))


def reshaped(use: Any, weight: torch.Tensor, where: str) -> NormBound:
    norm = float(torch.linalg.matrix_norm(weight.flatten(1), 2))
    return NormBound(norm, norm, "reshaped")


def no_joins(self: Any, step: Any, edges: Any, power: int = 1) -> Any:
    self.nodes.append(Node(step.name, edges[:1]))
    return Edge(len(self.nodes) - 1)


MISTAKES: list[tuple[Any, str, Any, str]] = [
    (lipschitz_limit, "_norm", reshaped, "plain"),
    (lipschitz_limit, "multiplicity", lambda step, norm: 1.0, "pools"),
    (lipschitz_limit, "operator_norm", lambda map_, source, norm: 0.1, "pools"),
    (lipschitz_limit._Builder, "_add", no_joins, "residual"),
    (lipschitz_limit._Builder, "_constant", lambda self, step: 1.0, "plain"),
]


@pytest.mark.parametrize(("where", "name", "wrong", "network"), MISTAKES)
def test_planted_mistakes_are_caught(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Any, network: str
) -> None:
    monkeypatch.setattr(where, name, wrong)
    run = started(parsed(NETWORKS[network]))
    with pytest.raises(AssertionError):
        check(run)


def constant_of(bundle: qopt.Bundle) -> tuple[float, str]:
    note = bundle.report.search.notes[-1]
    assert note.startswith("Lipschitz constant in l2 at most ")
    return float(note.split("at most ")[1].split(",")[0]), note


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The residual network as a file."""
    path = tmp_path_factory.mktemp("small") / "residual.onnx"
    path.write_bytes(to_bytes(parsed(NETWORKS["residual"])))
    return path


@pytest.mark.parametrize("search", ["greedy", "exact", "uniform"])
def test_the_main_job_without_images(small: Path, search: str) -> None:
    free = qopt.optimize(small, search=search, limits=("lipschitz<=1e9",))
    above = constant_of(free)[0]
    held = qopt.optimize(small, search=search, limits=(f"lipschitz<={above * 0.99:.4g}",))
    constant, note = constant_of(held)
    assert constant <= above * 0.99
    assert f"limit {float(f'{above * 0.99:.4g}'):.3g}: images moved by linf 8/255 move logits by at most" in note
    assert held.plan.weights != free.plan.weights
    assert "does not keep" not in " ".join(held.report.warnings)
    with pytest.raises(InfeasibleError):
        qopt.optimize(small, search=search, limits=("lipschitz<=0.01",))


def test_the_main_job_with_images_holds_the_rounded_weights(
    example_onnx: Path, fashion: Data, run_options: dict[str, Any]
) -> None:
    """GPTQ raises norms: what it was chosen for comes out above the limit, and weights are rounded to nearest."""
    options = {**run_options, "baselines": (), "equalisation": "off", "robust": False, "attack_images": 1}
    bundle = qopt.optimize(example_onnx, data=fashion, search="exact", limits=("lipschitz<=5e4",), **options)
    constant, note = constant_of(bundle)
    assert constant <= 5e4
    assert "by steps of quantized activations and rounding, which no constant bounds" in note
    notes = bundle.report.search.notes
    assert notes[0].startswith("optimal: no plan within the limits")
    assert notes[1].startswith("GPTQ raised the Lipschitz constant to ")
    assert bundle.plan.rounding == "nearest"
    rows = bundle.report.search.evaluated
    assert [row.chosen for row in rows].count(True) == 1
    assert next(row for row in rows if row.chosen).name.startswith("exact within lipschitz<=50000, nearest")
    assert len({row.digest for row in rows}) == len(rows)
    with pytest.raises(InfeasibleError, match="lipschitz<=50000: the rounding breaks the limit"):
        qopt.optimize(example_onnx, data=fashion, limits=("lipschitz<=5e4",), **options, rounding="gptq")


def test_algorithm_1_says_that_it_plays_without_limits(small: Path) -> None:
    bundle = qopt.optimize(small, search="lipschitz", limits=("lipschitz<=0.01",))
    assert bundle.exit_code == 1
    (row,) = [row for row in bundle.report.limits if row.machine == "calculus"]
    assert (row.limit, row.holds) == ("lipschitz<=0.01", False)
    warning = f"the plan does not keep the limit lipschitz<=0.01: {row.found} (calculus)"
    assert warning in bundle.report.warnings


def test_rows_do_not_go_with_it(example_onnx: Path, fashion: Data) -> None:
    with pytest.raises(UsageError, match="--rows: a limit on lipschitz chooses among formats of whole layers"):
        qopt.optimize(example_onnx, data=fashion, limits=("lipschitz<=1e9",), rows="on")


def test_behind_a_normalisation_only_the_constant_is_said(small: Path) -> None:
    bundle = qopt.optimize(small, limits=("lipschitz<=1e9",), mean=(0.5, 0.5), std=(0.5, 0.5))
    assert constant_of(bundle)[1].endswith("limit 1e+09, of the network behind the normalisation")
