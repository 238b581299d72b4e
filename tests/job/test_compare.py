"""`compare` on small networks: every figure against loops over what ONNX Runtime says of the same examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor

import qopt
from qopt.attacks import predict
from qopt.cache import Cache
from qopt.data import Data, Split
from qopt.job.compare import SHIFTED, compare
from qopt.job.compare_examples import Bench
from qopt.job.compare_figures import Made, best_transfer
from qopt.job.compare_options import CompareOptions
from qopt.measure.network import Normalisation
from qopt.measure.subject import Subject, open_subject
from qopt.report.comparison import Comparison
from qopt.threat import ThreatModel

NET = """g ({image} x) => ({logits} y) {{
    c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1,1,1,1], strides = [2,2]> (r1, w2, b2)
    r2 = Relu (c2)
    f = Flatten (r2)
    {extra}y = Gemm <transB = 1> ({last}, w3, b3)
}}"""
NO_TWIN = "s = Unique (f) z = ReduceSum <keepdims = 0> (s) n = Mul (z, nothing) k = Add (f, n) "
EPS, STEPS, IMAGES, SEED = 0.08, 6, 24, 3
KEYS = "ABCDE"
Array = NDArray[Any]


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes: one smooth pattern each, under noise; (count, 1, 8, 8) in [0, 1]."""
    patterns = F.interpolate(
        torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(11)), size=(8, 8), mode="bilinear"
    )
    labels = torch.arange(count) % 3
    noise = 0.15 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.12 * patterns[labels] + noise).clamp(0, 1), labels


def trained(seed: int) -> dict[str, Array]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (6, 1, 3, 3), "b1": (6,), "w2": (8, 6, 3, 3), "b2": (8,), "w3": (3, 128), "b3": (3,)}
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.3 * (len(shape) > 1)).requires_grad_()
        for name, shape in shapes.items()
    }
    images, labels = pictures(300, 1)
    optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(run(weights, images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: weight.detach().numpy() for name, weight in weights.items()}


def run(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    hidden = F.relu(F.conv2d(images, weights["w1"], weights["b1"], padding=1))
    hidden = F.relu(F.conv2d(hidden, weights["w2"], weights["b2"], stride=2, padding=1))
    return F.linear(hidden.flatten(1), weights["w3"], weights["b3"])


Build = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="module")
def build(text_model: Callable[..., onnx.ModelProto]) -> Build:
    def made(weights: dict[str, Array], batch: str = "n", extra: str = "", **more: Array) -> onnx.ModelProto:
        graph = NET.format(
            image=f"float[{batch},1,8,8]", logits=f"float[{batch},3]", extra=extra, last="k" if extra else "f"
        )
        return text_model(graph, opset=17, **weights, **more)

    return made


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return trained(2)


@pytest.fixture(scope="module")
def data() -> Data:
    def split(count: int, seed: int) -> Split:
        images, labels = pictures(count, seed)
        return Split(images.numpy(), labels.numpy())

    return Data(split(60, 5), split(60, 6), split(60, 7))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Array) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Array] | None:
        image = next(self.images, None)
        return None if image is None else {"x": image[None]}


@pytest.fixture(scope="module")
def files(build: Build, weights: dict[str, Array], data: Data, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A float network; the same by qopt at 4 bits and by ONNX Runtime at 8; another one; one without gradients."""
    folder = tmp_path_factory.mktemp("compare")
    names = ("float", "w4a4", "ort8", "other", "silent")
    paths = [folder / f"{name}.onnx" for name in names]
    onnx.save(build(weights), paths[0])
    options: dict[str, Any] = {"target": "int4-uniform", "search": "uniform", "activations": "int4", "baselines": ()}
    options |= {"effort": "fast", "rows": "off", "attack_images": 5, "probe_images": 8}
    paths[1].write_bytes(qopt.optimize(paths[0], data=data, **options).model)
    quantize_static(
        paths[0], paths[2], Reader(data.calibrate.images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    onnx.save(build(trained(4)), paths[3])
    onnx.save(build(weights, extra=NO_TWIN, nothing=np.float32(0)), paths[4])
    return paths


SMALL: dict[str, Any] = {"eps": EPS, "steps": STEPS, "images": IMAGES, "seed": SEED, "kappas": (0.5, 2.0)}


@dataclass(frozen=True)
class Case:
    """A comparison with what is needed to compute it again; logits are ONNX Runtime's own."""

    found: Comparison
    subjects: list[Subject]
    sessions: list[ort.InferenceSession]
    images: Tensor
    labels: Tensor
    cache: Path

    def logits(self, images: Tensor) -> list[Array]:
        return [session.run(None, {"x": images.numpy()})[0] for session in self.sessions]

    def examples(self) -> Iterator[tuple[int, int, Tensor]]:
        """Number of the attack, number of the source, and the examples that are in the cache."""
        bench = Bench(
            self.images, self.labels, ThreatModel("linf", EPS), Normalisation(), SEED, Cache(self.cache)
        )  # fmt: skip
        options = CompareOptions(**SMALL)
        for number, method in enumerate(options.methods(bench.threat)):
            for row in self.found.attacks[number].examples:
                source = KEYS.index(row.source)
                subject = self.subjects[source]
                attack = method.attacks[row.choice]
                outputs = predict(subject.artefact, self.images)
                yield number, source, bench.examples(subject, attack, outputs, method.queries)
        assert len(bench.cache.hits) == sum(len(attack.examples) for attack in self.found.attacks)


@pytest.fixture(scope="module")
def case(files: list[Path], data: Data, tmp_path_factory: pytest.TempPathFactory) -> Case:
    cache = tmp_path_factory.mktemp("cache")
    found = compare(files, data=data, cache=cache, **SMALL)
    subjects = [open_subject(path, Normalisation()) for path in files]
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in files]
    part = data.report.first(IMAGES)
    return Case(found, subjects, sessions, torch.from_numpy(part.images), torch.from_numpy(part.labels), cache)


def percent(flags: list[bool]) -> float | None:
    return 100 * sum(flags) / len(flags) if flags else None


def test_the_networks(case: Case, files: list[Path]) -> None:
    models = case.found.models
    assert [m.name for m in models] == [path.stem for path in files]
    assert "".join(m.key for m in models) == KEYS
    assert [m.quantized_activations for m in models] == [False, True, True, False, False]
    assert ["Unique" in m.no_gradients for m in models] == [False, False, False, False, True]
    assert [m.twin_agreement is None for m in models] == [False, False, False, False, True]
    assert all(m.twin_agreement is None or m.twin_agreement >= 95 for m in models)
    for model, logits in zip(models, case.logits(case.images), strict=True):
        right = logits.argmax(1) == case.labels.numpy()
        assert model.clean.value == pytest.approx(100 * right.mean())
        assert model.clean.low < model.clean.value < model.clean.high or right.all()
    assert models[0].clean.value > 80
    assert case.found.images == IMAGES
    assert case.found.threat == f"linf {EPS}"


def test_fgsm_by_hand(case: Case, weights: dict[str, Array]) -> None:
    """Made on the float network by autograd on its own weights, judged by every file."""
    images = case.images.clone().requires_grad_()
    logits = run({name: torch.from_numpy(weight) for name, weight in weights.items()}, images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, case.labels, reduction="sum"), images)
    right = (logits.argmax(1) == case.labels)[:, None, None, None]
    moved = (case.images + EPS * gradient.sign() * right).clamp(0, 1)
    expected = [percent((row.argmax(1) == case.labels.numpy()).tolist()) for row in case.logits(moved)]
    assert case.found.attacks[0].name == "FGSM"
    assert case.found.attacks[0].accuracy[0] == pytest.approx(expected)
    assert expected[0] is not None
    assert expected[0] < case.found.models[0].clean.value - 20


def test_accuracies_and_shifts_of_logits_are_those_of_loops(case: Case) -> None:
    labels, clean = case.labels.tolist(), case.logits(case.images)
    seen = 0
    for number, source, examples in case.examples():
        attack, logits = case.found.attacks[number], case.logits(examples)
        for target, row in enumerate(logits):
            right = [int(row[i].argmax()) == labels[i] for i in range(IMAGES)]
            assert attack.accuracy[source][target] == pytest.approx(percent(right))
            undone = [
                bool(row[i, a] > row[i, b])
                for i in range(IMAGES)
                for a in range(3)
                for b in range(3)
                if clean[source][i, a] > clean[source][i, b] and logits[source][i, a] < logits[source][i, b]
            ]
            assert attack.weight_shift[source][target] == pytest.approx(percent(undone))
        assert attack.weight_shift[source][source] in (0, None)
        seen += 1
    assert seen == 4 + 4 + 4 + 5


def test_rows_are_sources(case: Case) -> None:
    """Two networks trained apart: each falls for its own examples far more than for the other's."""
    for attack in case.found.attacks:
        matrix = attack.accuracy
        for a, b in ((0, 3), (3, 0)):
            own, foreign = matrix[a][a], matrix[a][b]
            assert own is not None
            assert foreign is not None
            assert own <= foreign, attack.name


def test_distances_of_examples(case: Case) -> None:
    labels = case.labels.numpy()
    for number, source, examples in case.examples():
        before, after = (case.logits(x)[source].argmax(1) == labels for x in (case.images, examples))
        moved = (examples - case.images).double().flatten(1)[torch.from_numpy(before & ~after)]
        (row,) = (r for r in case.found.attacks[number].examples if r.source == KEYS[source])
        assert row.fooled == len(moved) > 0
        assert row.l2 == pytest.approx(float(moved.norm(dim=1).mean()), abs=1e-5)
        assert row.linf == pytest.approx(float(moved.abs().amax(1).mean()), abs=1e-5)
        bounded = case.found.attacks[number].bound.startswith("linf")
        assert bounded == (not case.found.attacks[number].name.startswith("CW"))
        assert not bounded or row.linf <= EPS + 1e-6


def test_agreement_is_that_of_loops(case: Case) -> None:
    labels = case.labels.numpy()
    clean = [row.argmax(1) == labels for row in case.logits(case.images)]
    for number, source, examples in case.examples():
        after = [row.argmax(1) == labels for row in case.logits(examples)]
        others = [k for k in range(5) if k != source]
        was_right = [i for i in range(IMAGES) if clean[source][i]]
        fooled = [not any(after[k][i] for k in others) for i in was_right if not after[source][i]]
        held = [all(after[k][i] for k in others) for i in was_right if after[source][i]]
        row = case.found.agreement[source]
        found = row.attacks[case.found.attacks[number].name]
        assert row.source == KEYS[source]
        assert row.clean_right == pytest.approx(percent([all(clean[k][i] for k in others) for i in was_right]))
        assert found.fooled == pytest.approx(percent(fooled))
        assert found.not_fooled == pytest.approx(percent(held))
    assert list(case.found.agreement[4].attacks) == [case.found.attacks[3].name], "only queries start from the fifth"


def test_votes_are_those_of_loops(case: Case) -> None:
    labels = case.labels.tolist()
    places = {("", ""): case.images}
    places |= {(case.found.attacks[n].name, KEYS[s]): examples for n, s, examples in case.examples()}
    assert Counter((v.attack, v.source) for v in case.found.votes) == dict.fromkeys(places, 3)
    for vote in case.found.votes:
        predicted = np.stack([row.argmax(1) for row in case.logits(places[vote.attack, vote.source])])
        answers = {}
        for i in range(IMAGES):
            answer, count = Counter(predicted[:, i].tolist()).most_common(1)[0]
            if count >= vote.threshold:
                answers[i] = answer == labels[i]
        assert vote.prediction_rate == pytest.approx(100 * len(answers) / IMAGES)
        assert vote.accuracy == pytest.approx(percent(list(answers.values())))
        assert vote.defence_accuracy == pytest.approx(100 * (1 - list(answers.values()).count(False) / IMAGES))
    assert sorted({vote.threshold for vote in case.found.votes}) == [3, 4, 5]


def test_cosines_are_those_of_loops(case: Case) -> None:
    gradients = []
    for subject in case.subjects[:4]:
        images = case.images.clone().requires_grad_()
        loss = F.cross_entropy(subject.gradients(images).double(), case.labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, images)[0].double().flatten(1).numpy())
    for a, b in np.ndindex(4, 4):
        pairs = zip(gradients[a], gradients[b], strict=True)
        cosines = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) if x.any() and y.any() else 0.0 for x, y in pairs]
        assert case.found.cosines[a][b] == pytest.approx(float(np.mean(cosines)), abs=1e-5)
    assert case.found.cosines[4] == [None] * 5
    assert [row[4] for row in case.found.cosines] == [None] * 5


def values(path: Path, names: list[str], images: Tensor) -> list[Array]:
    """Values inside a file, as ONNX Runtime computes them without changing the graph."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, {"x": images.numpy()}))


def read_instead(path: Path, float_names: list[str]) -> dict[str, str]:
    """For each value of the float file, what a quantized file has behind its QuantizeLinear: found in the protobuf."""
    graph = onnx.load(path).graph
    readers = {name: node for node in graph.node for name in node.input[:1]}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in float_names:
            last = readers[node.output[0]]
            last = readers[last.output[0]] if last.op_type == "Clip" else last
            found[node.input[0]] = last.output[0]
    return found


@pytest.mark.parametrize("target", [1, 2])
def test_activation_shifts_are_those_of_loops(case: Case, files: list[Path], target: int) -> None:
    """On values that ONNX Runtime gives out."""
    stages = read_instead(files[target], ["x", "c1", "r1", "c2", "r2", "f", "y"])
    (examples,) = (e for number, source, e in case.examples() if (number, source) == (0, 0))
    rows = [r for r in case.found.activation_shift if (r.attack, r.target) == ("FGSM", KEYS[target])]
    assert [(row.source, row.quantized >= len(row.values)) for row in rows] == [("A", True)]
    found = {value.value: value for value in rows[0].values}
    assert {"r1", "r2"} <= set(stages) == set(found)
    total = Counter[str]()
    for name, behind in stages.items():
        (before,) = values(files[0], [name], examples)
        (after,) = values(files[target], [behind], examples)
        undone = pairs = hit = 0
        for a, b in zip(before.reshape(IMAGES, -1), after.reshape(IMAGES, -1), strict=True):
            different = a[:, None] != a
            ours = int((different & (b[:, None] == b)).sum()) // 2
            undone, pairs, hit = undone + ours, pairs + int(different.sum()) // 2, hit + (ours > 0)
        total.update(undone=undone, pairs=pairs)
        value = found[name]
        assert value.rate == pytest.approx(100 * undone / pairs, rel=0.02), name
        assert value.images == pytest.approx(100 * hit / IMAGES)
    assert rows[0].rate == pytest.approx(100 * total["undone"] / total["pairs"], rel=0.02)


def test_fewer_bits_make_more_activations_equal(case: Case) -> None:
    for attack in case.found.attacks:
        rates = {row.target: row.rate for row in case.found.activation_shift if row.attack == attack.name}
        assert set(rates) == {"B", "C"}
        assert rates["B"] > rates["C"] > 0
    assert case.found.shifted == min(SHIFTED, IMAGES)


def test_what_cannot_be_done_is_said(case: Case) -> None:
    (note,) = case.found.notes
    assert note.startswith("E: no gradients, so no source of attacks that need them: ")
    assert "Unique" in note
    for attack in case.found.attacks:
        assert (attack.accuracy[4] == [None] * 5) == (not attack.name.startswith("SPSA"))
        assert all(row[4] is not None for row in attack.accuracy[:4]), "but it judges"


def test_the_same_again(case: Case, files: list[Path], data: Data, tmp_path: Path) -> None:
    steps: list[str] = []
    again = compare(files, data=data, cache=case.cache, out=tmp_path / "out", progress=steps.append, **SMALL)
    assert again == case.found
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", "compare.md", "compare.html"}
    assert Comparison.from_json((tmp_path / "out" / "compare.json").read_text()) == again
    assert steps[0] == "open float"
    assert "SPSA-6 on E" in steps
    assert f"CW-L2 10x{STEPS} kappa 0.5 on B" in steps


@pytest.fixture(scope="module")
def pair(files: list[Path]) -> list[Path]:
    return [files[0], files[3]]


def test_nothing_kept_gives_the_same_and_the_seed_counts(pair: list[Path], data: Data) -> None:
    options: dict[str, Any] = {"attacks": ("pgd", "spsa"), "eps": EPS, "steps": 2, "images": 12}
    first, same, other = (compare(pair, data=data, seed=seed, **options).to_json() for seed in (0, 0, 1))
    assert first == same
    assert json.loads(first)["attacks"] != json.loads(other)["attacks"]


def test_in_other_batches(
    build: Build, weights: dict[str, Array], pair: list[Path], data: Data, tmp_path: Path
) -> None:
    """A file that takes five images at a time."""
    onnx.save(build(weights, batch="5"), tmp_path / "float.onnx")
    options: dict[str, Any] = {"attacks": ("fgsm", "bim"), "eps": EPS, "steps": 4, "images": 12}
    one, five = (compare([first, pair[1]], data=data, **options) for first in (pair[0], tmp_path / "float.onnx"))
    assert five.attacks == one.attacks
    assert five.cosines == one.cosines


def test_normalisation_outside_is_normalisation_inside(
    build: Build, weights: dict[str, Array], pair: list[Path], data: Data, tmp_path: Path
) -> None:
    """Networks for pixels in [0, 2]: the first layer has half as large weights."""
    paths = []
    for path, state in zip(pair, (weights, trained(4)), strict=True):
        paths.append(tmp_path / path.name)
        onnx.save(build({**state, "w1": state["w1"] / 2}), paths[-1])
    options: dict[str, Any] = {"attacks": ("fgsm",), "eps": EPS, "images": 12}
    inside = compare(pair, data=data, **options)
    outside = compare(paths, data=data, mean=(0.0,), std=(0.5,), **options)
    assert outside.attacks[0].accuracy == inside.attacks[0].accuracy
    assert [m.clean for m in outside.models] == [m.clean for m in inside.models]
    assert compare(paths, data=data, **options).attacks[0].accuracy != inside.attacks[0].accuracy


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_distance_no_change(pair: list[Path], data: Data, norm: str) -> None:
    found = compare(pair, data=data, attacks=("fgsm", "bim", "pgd", "spsa"), eps=0, norm=norm, steps=2, images=9)
    clean = [model.clean.value for model in found.models]
    for attack in found.attacks:
        assert attack.accuracy == [clean, clean]
        assert attack.weight_shift == [[None, None], [None, None]]
        assert [row.fooled for row in attack.examples] == [0, 0]


def test_of_several_leads_the_one_that_transfers_best_counts() -> None:
    """Made on the second of three; what fools the source itself does not count."""
    labels = torch.zeros(4, dtype=torch.long)

    def made(choice: str, wrong: list[int]) -> Made:
        logits = torch.zeros(3, 4, 2)
        logits[..., 0] = 1
        for network, count in enumerate(wrong):
            logits[network, :count, 1] = 2
        return Made(choice, torch.zeros(4, 1), logits)

    candidates = [made("a", [1, 4, 1]), made("b", [2, 0, 2]), made("c", [3, 4, 0])]
    assert best_transfer(candidates, labels, 1).choice == "b"
    assert best_transfer(candidates, labels, 0).choice == "a"
    assert best_transfer(candidates[:1], labels, 2).choice == "a"


def test_the_lead_that_was_chosen_is_the_best(case: Case, files: list[Path], data: Data) -> None:
    chosen = case.found.attacks[2]
    assert {row.choice for row in chosen.examples} <= {"kappa 0.5", "kappa 2"}
    options = {**SMALL, "attacks": ("cw",)}
    for kappa in SMALL["kappas"]:
        alone = compare(files, data=data, cache=case.cache, **{**options, "kappas": (kappa,)}).attacks[0]
        assert {row.choice for row in alone.examples} == {""}
        for source in range(4):
            ours, theirs = (
                sum(value for k, value in enumerate(a.accuracy[source]) if k != source and value is not None)
                for a in (chosen, alone)
            )
            assert ours <= theirs


@pytest.mark.assets
def test_public_networks(assets: Path, tmp_path: Path) -> None:
    """A network that was trained adversarially keeps what fools one that was not."""
    with np.load(assets / "data" / "cifar10_small.npz") as file:
        test = Split(file["x_test"][:20].astype(np.float32) / 255, file["y_test"][:20].astype(np.int64))
    paths = [assets / "onnx" / f"{name}.onnx" for name in ("resnet20_cifar10_std", "vresnet2b_cifar10_adv2")]
    found = compare(paths, data=Data(test, test, test), attacks=("bim",), eps="2/255", steps=10)
    (own, other), (back, _) = found.attacks[0].accuracy
    assert own is not None
    assert other is not None
    assert back is not None
    assert own < 20
    assert other == found.models[1].clean.value
    assert back > 60
