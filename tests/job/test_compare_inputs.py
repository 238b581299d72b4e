"""What `compare` refuses, how it names files, what it takes for the same file: on networks that were not trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qopt.attacks import BIM, CW, SPSA
from qopt.data import Data, Split
from qopt.errors import DataError, ModelError, UnsupportedModelError, UsageError
from qopt.job.compare import compare
from qopt.job.compare_options import CompareOptions
from qopt.job.compare_subjects import tell_apart
from qopt.threat import ThreatModel

NET = "g (float[n,{shape}] x) => (float[n,{classes}] y) {{ f = Flatten (x) {extra}y = MatMul ({last}, w) }}"
NO_TWIN = "s = Unique (f) z = ReduceSum <keepdims = 0> (s) n = Mul (z, nothing) k = Add (f, n) "
WORDS = "g (int64[n, s] x) => (float[n, s, 4] y) { y = Gather (w, x) }"
Build = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="module")
def build(text_model: Callable[..., onnx.ModelProto]) -> Build:
    """A linear network with random weights."""

    def made(seed: int, shape: str = "1,8,8", classes: int = 3, extra: str = "", **more: Any) -> onnx.ModelProto:
        size = int(np.prod([int(part) for part in shape.split(",")]))
        weights = np.random.default_rng(seed).normal(size=(size, classes)).astype(np.float32)
        text = NET.format(shape=shape, classes=classes, extra=extra, last="k" if extra else "f")
        return text_model(text, opset=17, w=weights, **more)

    return made


@pytest.fixture(scope="module")
def folder(build: Build, text_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right and wrong files."""
    place = tmp_path_factory.mktemp("networks")
    silent = {"extra": NO_TWIN, "nothing": np.float32(0)}
    made = {
        "float": build(0), "other": build(1), "ten": build(0, classes=10), "wide": build(0, shape="3,8,8"),
        "silent": build(0, **silent), "quiet": build(1, **silent),
        "words": text_model(WORDS, w=np.ones((9, 4), np.float32)), "nan": build(0),
    }  # fmt: skip
    weights = np.full((64, 3), 3e38, np.float32)
    made["nan"].graph.initializer[0].raw_data = weights.tobytes()
    for name, model in made.items():
        onnx.save(model, place / f"{name}.onnx")
    content = (place / "float.onnx").read_bytes()
    (place / "damaged.onnx").write_bytes(content[: len(content) // 2])
    return place


@pytest.fixture(scope="module")
def data() -> Data:
    generator = np.random.default_rng(0)
    split = Split(generator.random((30, 1, 8, 8), dtype=np.float32), generator.integers(0, 3, 30))
    return Data(split, split, split, ("a note on the data",))


def test_names_tell_files_apart(tmp_path: Path) -> None:
    def names(*paths: str) -> list[str]:
        return tell_apart([tmp_path / path for path in paths])

    assert names("a.onnx", "b.onnx") == ["a", "b"]
    assert names("int8/model.onnx", "int4/model.onnx", "b.onnx") == ["int8/model", "int4/model", "b"]
    assert names("one/int8/model.onnx", "two/int8/model.onnx") == ["one/int8/model", "two/int8/model"]
    assert names("a.onnx", "a.pt2") == ["a.onnx", "a.pt2"]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one": ({"models": ["float"]}, UsageError, "compared with each other .*expected 2 to 26, got 1"),
    "none": ({"models": []}, UsageError, "compared with each other"),
    "too many": ({"models": ["float"] * 27}, UsageError, "expected 2 to 26, got 27"),
    "not finite": ({"models": ["float", "nan"]}, ModelError, "nan: .*not finite"),
    "twice": ({"models": ["float", "other", "float"]}, UsageError, "float.onnx: the same file twice"),
    "missing": ({"models": ["float", "missing"]}, UsageError, "missing.onnx: no such model file"),
    "damaged": ({"models": ["float", "damaged"]}, ModelError, "damaged.onnx: "),
    "other shape": (
        {"models": ["float", "wide"]}, UsageError, r"wide.onnx: .* different shapes \(expected \(1, 8, 8\), as float"
    ),
    "other classes": ({"models": ["float", "ten"]}, UsageError, "ten: .*numbers of classes .*3, as float, got 10"),
    "text": ({"models": ["words", "float"]}, ModelError, "words.*no classifier of images"),
    "no gradients": ({"models": ["silent", "quiet"], "attacks": ("cw",)}, UnsupportedModelError, "--attack spsa"),
    "attack": ({"attacks": ("fgsm", "bmi")}, UsageError, "--attack: unknown attack .*'bim'"),
    "attacks twice": ({"attacks": ("fgsm", "fgsm")}, UsageError, "--attack: .*all different"),
    "no attack": ({"attacks": ()}, UsageError, "--attack: one or more"),
    "images": ({"images": 0}, UsageError, "--images: must be at least 1"),
    "steps": ({"steps": 0}, UsageError, "--steps: must be at least 1"),
    "no kappa": ({"kappas": ()}, UsageError, "--kappa: one or more"),
    "kappa": ({"kappas": (1.0, -1.0)}, UsageError, "--kappa: kappa must be"),
    "eps": ({"eps": "eight"}, UsageError, "--eps: eps is not a number"),
    "negative eps": ({"eps": -0.1}, UsageError, "--eps: eps must be"),
    "norm": ({"norm": "l1"}, UsageError, "--norm: unknown norm"),
    "std": ({"mean": (0.5,), "std": (0.0,)}, UsageError, "--std: std must be positive"),
    "channels": ({"mean": (0.5,) * 3, "std": (1.0,) * 3}, UsageError, "one mean and std per channel"),
    "option": ({"kappa": 3}, UsageError, "unknown option .*'kappas'"),
    "data": ({"data": "nowhere.npz"}, UsageError, "nowhere.npz: no such data"),
    "labels": ({"data": 3}, DataError, "label out of range .*0 to 2"),
    "image size": ({"data": 9}, DataError, r"images do not fit the network .*expected \(1, 8, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name: str, folder: Path, data: Data) -> None:
    change, kind, words = WRONG[name]
    options: dict[str, Any] = {"models": ["float", "other"], "data": data, "attacks": ("fgsm",), "images": 6, **change}
    if isinstance(options["data"], int):
        side = options["data"] if options["data"] == 9 else 8
        split = Split(np.zeros((6, 1, side, side), np.float32), np.full(6, 3))
        options["data"] = Data(split, split, split)
    with pytest.raises(kind, match=words) as caught:
        compare([folder / f"{model}.onnx" for model in options.pop("models")], out=folder / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_weights_outside_the_file_that_change_are_seen(build: Build, folder: Path, data: Data, tmp_path: Path) -> None:
    """The file itself stays as it is, byte by byte; what was kept for it must not be used."""
    path, options = tmp_path / "outside.onnx", dict[str, Any](attacks=("fgsm",), eps=0.02)
    found = []
    for seed in (2, 3):
        (tmp_path / "weights").unlink(missing_ok=True)
        onnx.save(build(seed), path, save_as_external_data=True, location="weights", size_threshold=0)
        found.append(compare([path, folder / "float.onnx"], data=data, cache=tmp_path / "cache", **options))
    assert found[0].models[0].digest == found[1].models[0].digest
    fresh = compare([path, folder / "float.onnx"], data=data, **options)
    assert fresh.attacks == found[1].attacks != found[0].attacks


def test_networks_without_gradients_are_compared_by_queries(folder: Path, data: Data) -> None:
    paths = [folder / f"{name}.onnx" for name in ("silent", "quiet")]
    found = compare(paths, data=data, attacks=("fgsm", "spsa"), eps=0.05, steps=3)
    assert [attack.name for attack in found.attacks] == ["SPSA-3"]
    assert all(value is not None for row in found.attacks[0].accuracy for value in row)
    assert found.cosines == [[None, None], [None, None]]
    assert found.activation_shift == []
    assert found.notes[0] == "a note on the data"
    assert [note[:2] for note in found.notes[1:3]] == ["A:", "B:"]
    assert found.notes[3] == "FGSM: no network has the gradients that it needs"


def test_probabilities_are_noted(text_model: Build, folder: Path, data: Data, tmp_path: Path) -> None:
    text = "g (float[n,1,8,8] x) => (float[n,3] y) { f = Flatten (x) l = MatMul (f, w) y = Softmax <axis = 1> (l) }"
    weights = np.random.default_rng(5).normal(size=(64, 3)).astype(np.float32)
    onnx.save(text_model(text, w=weights), tmp_path / "soft.onnx")
    found = compare([folder / "float.onnx", tmp_path / "soft.onnx"], data=data, attacks=("fgsm",), eps=0.05)
    assert found.notes[1].startswith("B: softmax-output: ")


def test_a_link_is_called_what_it_is_called(folder: Path, data: Data, tmp_path: Path) -> None:
    (tmp_path / "named.onnx").symlink_to(folder / "other.onnx")
    paths = [folder / "float.onnx", tmp_path / "named.onnx"]
    found = compare(paths, data=data, attacks=("fgsm",), eps=0.05, images=5)
    assert [model.name for model in found.models] == ["float", "named"]
    with pytest.raises(UsageError, match="the same file twice"):
        compare([*paths, folder / "other.onnx"], data=data)


def test_the_command_says_what_is_not_at_its_default(folder: Path, data: Data, tmp_path: Path) -> None:
    np.savez(tmp_path / "my data.npz", x=data.report.images, y=data.report.labels)
    paths = [folder / "float.onnx", folder / "other.onnx"]
    options: dict[str, Any] = {"attacks": ("pgd", "cw"), "kappas": (0.5, 2), "eps": "8/255", "steps": 2, "images": 7}
    found = compare(paths, data=tmp_path / "my data.npz", mean=(0.0,), std=(1.0,), seed=4, **options)
    words = shlex.split(found.command)
    assert words[:4] == ["qopt", "compare", *map(str, paths)]
    given = list(zip(words[4::2], words[5::2], strict=True))
    assert given == [
        ("--data", str(tmp_path / "my data.npz")), ("--attack", "pgd"), ("--attack", "cw"),
        ("--eps", f"{8 / 255:.17g}"), ("--images", "7"), ("--steps", "2"), ("--kappa", "0.5,2"), ("--mean", "0"),
        ("--std", "1"), ("--seed", "4"),
    ]  # fmt: skip
    plain = compare(paths, data=data, attacks=("fgsm",))
    assert plain.command == shlex.join(["qopt", "compare", *map(str, paths), "--attack", "fgsm"])
    assert plain.threat == "linf 0.1", "the default of one channel"


def test_attacks_are_those_of_the_paper() -> None:
    """At its eps and steps; appendix B of Bernhard et al."""
    options = CompareOptions(attacks=("fgsm", "bim", "cw", "spsa", "pgd"), steps=100, kappas=(0.0, 25.0))
    fgsm, bim, cw, spsa, pgd = options.methods(ThreatModel("linf", 0.03))
    (step,) = bim.attacks.values()
    assert isinstance(step, BIM)
    assert (step.steps, step.compact) == (100, False)
    assert step.step == pytest.approx(0.0003)
    carlini = cw.attacks["kappa 25"]
    assert isinstance(carlini, CW)
    assert (carlini.steps, carlini.search_steps, carlini.learning_rate, carlini.constant) == (100, 10, 0.1, 0.9)
    assert {label: getattr(attack, "kappa") for label, attack in cw.attacks.items()} == {"kappa 0": 0, "kappa 25": 25}  # noqa: B009
    (queries,) = spsa.attacks.values()
    assert isinstance(queries, SPSA)
    assert (queries.steps, queries.samples, queries.delta) == (100, 128, 0.01)
    assert queries.learning_rate is None, "a third of eps"
    assert [method.queries for method in (fgsm, bim, cw, spsa, pgd)] == [False, False, False, True, False]
    assert [method.name for method in (fgsm, bim, cw, spsa, pgd)] == [
        "FGSM", "BIM-100", "CW-L2 10x100", "SPSA-100", "PGD-100"
    ]  # fmt: skip
    assert all(not getattr(attack, "compact", False) for method in (bim, pgd) for attack in method.attacks.values())


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("steps", [1, 7])
def test_steps_of_bim_reach_the_surface(eps: float, steps: int) -> None:
    (method,) = CompareOptions(attacks=("bim",), steps=steps).methods(ThreatModel("linf", eps))
    (attack,) = method.attacks.values()
    assert isinstance(attack, BIM)
    assert attack.step is None if eps == 0 else attack.step == pytest.approx(eps / steps)
    assert method.bound == str(ThreatModel("linf", eps))
