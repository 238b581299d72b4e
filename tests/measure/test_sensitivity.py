"""Running the rest of a network under a new weight equals, bit for bit, running all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from qopt.attacks import predict
from qopt.errors import DataError, ModelError
from qopt.graph.model import Prepared
from qopt.measure import sensitivity
from qopt.measure.network import Normalisation, TwinClassifier
from qopt.measure.sensitivity import version_logits
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.passes.watcher import live_bytes
from qopt.quantize import Quantizer

Network = Callable[[str], Prepared]
Versions = Callable[[str], Iterable[torch.Tensor]]
Found = dict[tuple[str, int], torch.Tensor]

NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def _model(prepared: Prepared, normalisation: Normalisation = NORMALISATION) -> TwinClassifier:
    return TwinClassifier(Quantizer(prepared).float_graph, normalisation, prepared.batch)


def _images(count: int, *shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def _sources(model: TwinClassifier) -> dict[str, torch.fx.Node]:
    return {node.meta["layer"]: weight_source(node) for node in model.graph.graph.nodes if is_layer(node)}


def _versions(model: TwinClassifier, count: int = 2) -> dict[str, list[torch.Tensor]]:
    """The float weight itself, and others."""
    generator = torch.Generator().manual_seed(4)
    weights = {layer: constant_of(model.graph, source) for layer, source in _sources(model).items()}
    return {
        layer: [weight.clone(), *(torch.randn(weight.shape, generator=generator) / 3 for _ in range(count - 1))]
        for layer, weight in weights.items()
    }


def _plain(
    model: TwinClassifier, images: torch.Tensor, versions: dict[str, list[torch.Tensor]], batch_size: int
) -> Found:
    """The oracle: overwrite the weight, run everything."""
    result: Found = {}
    for layer, tensors in versions.items():
        for number, values in enumerate(tensors):
            private = TwinClassifier(copy.deepcopy(model.graph), model.normalisation, model.batch)
            constant_of(private.graph, _sources(private)[layer]).copy_(values)
            result[layer, number] = predict(private, images, batch_size)
    return result


def _fast(model: TwinClassifier, images: torch.Tensor, versions: Versions) -> Found:
    parts: dict[tuple[str, int], list[torch.Tensor]] = {}
    for found in version_logits(model, images, versions):
        kept = parts.setdefault((found.name, found.version), [])
        assert found.start == sum(len(part) for part in kept)
        kept.append(found.logits)
    return {key: torch.cat(part) for key, part in parts.items()}


def _same(found: Found, expected: Found) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[key], logits) for key, logits in expected.items())


@dataclass
class _Writer:
    """ONNX text of a network whose inner values are all (n, 3, 5, 5)."""

    values: list[str] = field(default_factory=lambda: ["x"])
    weights: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def weight(self, shape: str) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = f"float[{shape}] {name}"
        return name

    def line(self, call: str, attributes: str = "") -> None:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {call.replace('(', f'{attributes} (', 1)}")
        self.values.append(name)

    def text(self, batch: int | None) -> str:
        """Flattened into a classifier; its last sum binds it to ``batch``."""
        head = [f"f = Flatten ({self.values[-1]})", "m = MatMul (f, fc)"]
        head += ["y = Identity (m)"] if batch is None else ["y = Add (m, zeros)"]
        inputs = [*self.weights.values(), "float[75,4] fc", *([] if batch is None else [f"float[{batch},4] zeros"])]
        size = batch or "n"
        declared = f"(float[{size},3,5,5] x, {', '.join(inputs)}) => (float[{size},4] y)"
        return f"{declared} {{\n" + "\n".join([*self.lines, *head]) + "\n}"


@st.composite
def _texts(draw: st.DrawFn) -> str:
    """Networks with branches, sums, joins, and weights that several calls share, also as plain data."""
    writer = _Writer()
    kinds = ["conv", "conv", "shared", "relu", "add", "concat", "data"]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=7)):
        first, second = (draw(st.sampled_from(writer.values[-3:])) for _ in range(2))
        square = [name for name, text in writer.weights.items() if "[3,3,3,3]" in text]
        if kind == "relu":
            writer.line(f"Relu ({first})")
        elif kind == "add":
            writer.line(f"Add ({first}, {second})")
        elif kind == "concat":
            writer.line(f"Concat ({first}, {second})", "<axis = 1>")
            joined = writer.values.pop()
            writer.line(f"Conv ({joined}, {writer.weight('3,6,1,1')})")
        elif kind == "data" and square:
            name = draw(st.sampled_from(square))
            writer.line(f"ReduceSum <keepdims = 1> ({name})")
            writer.line(f"Mul ({first}, {writer.values.pop()})")
        else:
            shared = kind == "shared" and square
            name = draw(st.sampled_from(square)) if shared else writer.weight("3,3,3,3")
            writer.line(f"Conv ({first}, {name})", "<pads = [1,1,1,1]>")
    return writer.text(draw(st.sampled_from([None, None, 2, 3])))


@settings(max_examples=40)
@given(text=_texts(), count=st.integers(1, 9), batch=st.integers(1, 4), runs=st.integers(1, 4))
def test_it_equals_running_the_whole_network(text: str, count: int, batch: int, runs: int, network: Network) -> None:
    model = _model(network(text))
    images, versions = _images(count, 3, 5, 5), _versions(model)
    each = live_bytes(model.graph, _images(model.batch or 1, 3, 5, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "BATCH", batch)
        patch.setattr(sensitivity, "ACTIVATION_BYTES", each * runs * (1 if model.batch else batch))
        found = _fast(model, images, versions.__getitem__)
    size = batch if runs > 1 else max(batch // 2, 1)  # half of what fits, so that the rest of the network fits too
    assert _same(found, _plain(model, images, versions, model.batch or size))


BRANCHES = """(float[n,3,5,5] x, float[3,3,3,3] a, float[3,3,3,3] b, float[3,6,1,1] c, float[75,4] fc)
        => (float[n,4] y) {
    a1 = Conv <pads = [1,1,1,1]> (x, a)
    b1 = Conv <pads = [1,1,1,1]> (x, b)
    r = Relu (a1)
    a2 = Conv <pads = [1,1,1,1]> (r, a)
    s = Add (a2, b1)
    j = Concat <axis = 1> (s, r)
    c1 = Conv (j, c)
    f = Flatten (c1)
    y = MatMul (f, fc)
}"""


def test_the_oracle_notices_a_use_that_keeps_the_old_weight(network: Network) -> None:
    model = _model(network(BRANCHES))
    images, versions = _images(5, 3, 5, 5), _versions(model)
    expected = _plain(model, images, versions, 5)
    calls = [node for node in model.graph.graph.nodes if node.meta.get("layer") == "a"]
    assert len(calls) == 2
    assert _same(_fast(model, images, versions.__getitem__), expected)
    broken = TwinClassifier(copy.deepcopy(model.graph), model.normalisation)
    broken.graph.register_buffer("other", constant_of(broken.graph, _sources(broken)["a"]).clone())
    last = [node for node in broken.graph.graph.nodes if node.meta.get("layer") == "a"][1]
    with broken.graph.graph.inserting_before(last):
        last.update_arg(1, broken.graph.graph.get_attr("other"))
    broken.graph.recompile()
    assert not _same(_fast(broken, images, versions.__getitem__), expected)


def test_a_weight_that_several_nodes_fetch_is_replaced_in_all_of_them(network: Network) -> None:
    model = _model(network(BRANCHES))
    expected = _plain(model, _images(5, 3, 5, 5), _versions(model), 5)
    last = [node for node in model.graph.graph.nodes if node.meta.get("layer") == "a"][1]
    with model.graph.graph.inserting_before(last):
        last.update_arg(1, model.graph.graph.get_attr(str(weight_source(last).target)))
    model.graph.recompile()
    assert _same(_fast(model, _images(5, 3, 5, 5), _versions(model).__getitem__), expected)


def test_the_first_version_is_the_float_network(network: Network) -> None:
    model = _model(network(BRANCHES))
    images = _images(7, 3, 5, 5)
    logits = predict(model, images)
    found = _fast(model, images, _versions(model).__getitem__)
    assert {layer for layer, _ in found} == {"a", "b", "c", "fc"}
    for layer in ("a", "b", "c", "fc"):
        assert torch.equal(found[layer, 0], logits)
        assert not torch.allclose(found[layer, 1], logits, atol=0.1)


def test_what_comes_before_a_layer_runs_once(network: Network) -> None:
    chain = "".join(f"v{i} = Conv <pads = [1,1,1,1]> ({f'v{i - 1}' if i else 'x'}, w{i})\n" for i in range(4))
    weights = ", ".join(f"float[3,3,3,3] w{i}" for i in range(4))
    text = f"(float[n,3,5,5] x, {weights}) => (float[n,75] y) {{ {chain} y = Flatten (v3) }}"
    model = _model(network(text))
    images, versions = _images(6, 3, 5, 5), _versions(model, 3)
    with FlopCounterMode(display=False) as one:
        model(images[:1])
    layer = one.get_total_flops() // 4
    with FlopCounterMode(display=False) as counter:
        _fast(model, images, versions.__getitem__)
    once, memory = 6 * 4, 4
    assert counter.get_total_flops() == layer * (once + memory + 6 * 3 * (4 + 3 + 2 + 1))


@pytest.mark.parametrize(
    ("batches", "goes"), [(0.5, 13), (1, 13), (2, 13), (4, 7), (8, 3), (12, 2), (14, 2), (16, 1), (1000, 1)]
)
def test_fewer_images_are_side_by_side_where_they_do_not_fit(
    batches: float, goes: int, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``batches`` images fit: one half at most is in one run, and the runs side by side leave room for it."""
    model = _model(network(BRANCHES))
    images, versions = _images(13, 3, 5, 5), _versions(model)
    asked: list[str] = []

    def watched(layer: str) -> Iterator[torch.Tensor]:
        asked.append(layer)
        return iter(versions[layer])

    monkeypatch.setattr(sensitivity, "BATCH", 2)
    monkeypatch.setattr(sensitivity, "ACTIVATION_BYTES", int(batches * live_bytes(model.graph, images[:1])))
    found = _fast(model, images, watched)
    assert [asked.count(layer) for layer in versions] == [goes] * 4
    assert _same(found, _plain(model, images, versions, 2 if batches >= 4 else 1))


@pytest.mark.parametrize("grad", [True, False])
def test_the_model_and_the_gradient_mode_stay(grad: bool, network: Network) -> None:
    model = _model(network(BRANCHES))
    before = {key: tensor.clone() for key, tensor in model.graph.named_buffers()}
    versions = _versions(model)
    with torch.set_grad_enabled(grad):
        for found in version_logits(model, _images(5, 3, 5, 5), versions.__getitem__):
            assert torch.is_grad_enabled() is grad
            assert not found.logits.requires_grad
    assert all(torch.equal(before[key], tensor) for key, tensor in model.graph.named_buffers())


def test_versions_take_the_layout_and_type_of_the_weight(network: Network) -> None:
    model = _model(network(BRANCHES))
    images, versions = _images(5, 3, 5, 5), _versions(model)
    other = {layer: [t.double().mT.contiguous().mT for t in tensors] for layer, tensors in versions.items()}
    assert not other["fc"][0].is_contiguous()
    assert _same(_fast(model, images, other.__getitem__), _plain(model, images, versions, 5))


def test_a_layer_without_versions_is_passed_over(network: Network) -> None:
    model = _model(network(BRANCHES))
    versions = {**_versions(model), "b": []}
    assert {layer for layer, _ in _fast(model, _images(3, 3, 5, 5), versions.__getitem__)} == {"a", "c", "fc"}


def test_logits_that_are_not_finite_are_an_error(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(network(BRANCHES), Normalisation())
    monkeypatch.setattr(sensitivity, "BATCH", 2)
    monkeypatch.setattr(sensitivity, "ACTIVATION_BYTES", 4 * live_bytes(model.graph, _images(1, 3, 5, 5)))
    images, versions = torch.zeros(5, 3, 5, 5), _versions(model)
    images[3] = 1.0
    versions["c"][1] = torch.full_like(versions["c"][1], 3e38)  # only image 3 is not zero everywhere
    with pytest.raises(ModelError, match="image 3"):
        _fast(model, images, versions.__getitem__)


def test_images_outside_the_box_are_an_error(network: Network) -> None:
    model = _model(network(BRANCHES))
    with pytest.raises(DataError, match="outside the box"):
        _fast(model, 2 * torch.ones(5, 3, 5, 5), _versions(model).__getitem__)


def test_images_of_another_shape_are_an_error(network: Network) -> None:
    model = _model(network(BRANCHES), Normalisation())
    with pytest.raises(RuntimeError):
        _fast(model, _images(5, 1, 2, 2), _versions(model).__getitem__)
