"""The suite on one file: what counts, who is asked, and that the same task always gives the same report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import qopt
from qopt.attacks import CW, FGSM, MIM, PGD, SPSA, AttackResult, Budget, GaussianNoise, Square
from qopt.cache import Cache
from qopt.data import Data, Split
from qopt.errors import DataError, ModelError, UsageError
from qopt.job import attack_rows
from qopt.job.attack import AttackTask, Source, attack_model
from qopt.job.attack_masking import UnderAll
from qopt.measure.network import Normalisation
from qopt.measure.presets import Entry, Preset, Unbounded
from qopt.measure.subject import open_subject
from qopt.report.attack_report import AttackReport
from qopt.statistics import wilson
from qopt.threat import ThreatModel

HEAD = "g (float[n, 1, 6, 6] x) => (float[n, 4] y)"
CONV = "c = Conv <pads = [1, 1, 1, 1]> (x, k, b) a = Relu(c)"
GRAPHS = {
    "float": f"{HEAD} {{ {CONV} f = Flatten(a) y = Gemm(f, w, d) }}",
    "rounded": f"{HEAD} {{ {CONV} q = QuantizeLinear(a, s, z) r = DequantizeLinear(q, s, z) f = Flatten(r) y = Gemm(f, w, d) }}",  # noqa: E501
    "refused": f"{HEAD} {{ {CONV} i = CenterCropPad <axes = [1, 2, 3]> (a, size) f = Flatten(i) y = Gemm(f, w, d) }}",
    "other": f"{HEAD} {{ f = Flatten(x) h = Gemm(f, u, d2) a = Tanh(h) y = Gemm(a, v, d) }}",
    "wide": "g (float[n, 1, 7, 7] x) => (float[n, 4] y) { f = Flatten(x) y = Gemm(f, m, d) }",
    "classes": f"{HEAD} {{ f = Flatten(x) y = Gemm(f, e) }}",
    "softmax": f"{HEAD} {{ {CONV} f = Flatten(a) l = Gemm(f, w, d) y = Softmax(l) }}",
    "broken": f"{HEAD} {{ {CONV} f = Flatten(a) l = Gemm(f, w, d) o = Sub(l, l) y = Div(l, o) }}",
}  # fmt: skip
THREAT = ThreatModel("linf", 0.06)
BUDGET = Budget(
    images=30, queried_images=6, longer=PGD(steps=12), iterative=PGD(steps=6), other_loss=PGD(steps=6, loss="margin"),
    queries=SPSA(steps=3, samples=16), eps_factors=(1, 2),
)  # fmt: skip
SUITE = Preset(
    "own", (Entry(FGSM(), THREAT), Entry(PGD(steps=6), THREAT)),
    (Entry(PGD(steps=6, compact=False), THREAT), Entry(MIM(steps=6, compact=False), THREAT)),
    (Entry(Square(queries=40), THREAT),), budget=BUDGET,
)  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return {
        "k": normal(5, 1, 3, 3), "b": 0.1 * normal(5), "w": 0.2 * normal(180, 4), "d": 0.1 * normal(4),
        "u": 0.3 * normal(36, 8), "v": normal(8, 4), "d2": 0.1 * normal(8), "m": normal(49, 4), "e": normal(36, 3),
        "s": np.array(0.6, np.float32), "z": np.array(0, np.uint8), "size": np.array([5, 6, 6]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_model: Callable[..., onnx.ModelProto]) -> Path:
    """Every graph as a file, and the float one as onnxruntime quantizes it."""
    folder = tmp_path_factory.mktemp("attacked")
    for name, graph in GRAPHS.items():
        used = {key: value for key, value in arrays().items() if f" {key})" in graph or f" {key}," in graph}
        onnx.save(text_model(graph, **used), folder / f"{name}.onnx")
    quantize_static(str(folder / "float.onnx"), str(folder / "foreign.onnx"), Reader())
    return folder


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.feeds = iter([{"x": pixels(40)}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(1).random((count, 1, 6, 6), dtype=np.float32)


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": images})[0].argmax(1), np.int64)


def labelled(path: Path, count: int = 30, wrong: int = 3) -> Data:
    """Images with the file's own predictions as labels, but for the first ones, which are one class off."""
    images = pixels(count)
    labels = answers(path, images)
    labels[:wrong] = (labels[:wrong] + 1) % 4
    part = Split(images, labels)
    return Data(part, part, part)


@pytest.fixture
def attack(place: Path) -> Callable[..., AttackReport]:
    """Attack the named file without a cache, labelled by the float network."""

    def run(name: str, cache: Cache | None = None, progress: Any = None, **options: Any) -> AttackReport:
        options = {"eps": THREAT.eps, "preset": SUITE, "data": labelled(place / "float.onnx"), **options}
        task = AttackTask(place / f"{name}.onnx", **options)
        return attack_model(task, cache or Cache(None), progress or (lambda step: None))

    return run


Run = Callable[..., AttackReport]


class TestOneNumber:
    def test_it_is_the_per_example_worst_of_clean_and_all_attacks(self, place: Path, attack: Run) -> None:
        """Against attacks run by hand on a float network, where twin and file compute the same."""
        data = labelled(place / "float.onnx")
        images, labels = torch.from_numpy(data.report.images), torch.from_numpy(data.report.labels)
        subject = open_subject(place / "float.onnx", Normalisation())
        clean = answers(place / "float.onnx", data.report.images) == data.report.labels
        rows, worst = [], clean.copy()
        for entry in SUITE.entries:
            made = entry.attack(
                subject.gradients, images, labels, THREAT, seed=qopt_seed(0), indices=torch.arange(len(images))
            ).adversarial.numpy()  # fmt: skip
            right = (answers(place / "float.onnx", made) == data.report.labels) & clean
            rows.append(100 * float(right.mean()))
            worst &= right
        report = attack("float")
        assert [row.accuracy.value for row in report.rows] == pytest.approx(rows)
        assert report.robust_accuracy == pytest.approx(100 * worst.mean())
        expected = wilson(int(worst.sum()), 30)
        assert (report.interval.low, report.interval.high) == pytest.approx((100 * expected.low, 100 * expected.high))
        assert report.clean.value == pytest.approx(90.0)
        assert 0 < report.robust_accuracy < 90
        assert (report.model.agreement, report.model.gradients) == (100.0, ["exact"])

    def test_a_larger_ball_or_another_norm_counts_only_where_examples_lie_in_the_declared_one(
        self, attack: Run
    ) -> None:
        entries = (
            Entry(FGSM(), ThreatModel("linf", 0.3)), Entry(PGD(steps=6), ThreatModel("l2", 0.1)),
            Entry(Unbounded(CW(steps=30, search_steps=3)), None), Entry(FGSM(), ThreatModel("linf", 0.02)),
        )  # fmt: skip
        report = attack("float", preset=Preset("own", entries, budget=BUDGET))
        strong, l2, cw, _ = report.rows
        assert [row.counts for row in report.rows] == [False, False, False, True]
        assert strong.fooled > 0
        assert strong.within == 0
        assert cw.fooled == 27, "an attack without a bound fools everything that was right"
        assert 0 < cw.within < cw.fooled
        assert 0 < l2.within <= l2.fooled
        assert report.robust_accuracy <= 90 - 100 * cw.within / 30
        assert cw.norm is None
        assert l2.mean_l2 is not None
        assert l2.mean_l2 <= 0.1 + 1e-6

    def test_attacks_in_turn_only_see_what_is_left(self, attack: Run) -> None:
        each, turn = attack("float"), attack("float", preset=replace(SUITE, in_turn=True))
        assert turn.robust_accuracy == each.robust_accuracy
        assert [row.accuracy.value for row in turn.rows][-1] == turn.robust_accuracy
        assert sum(row.fooled for row in turn.rows) == round(0.3 * (90 - turn.robust_accuracy))

    def test_eps_0_leaves_the_clean_accuracy(self, attack: Run) -> None:
        entries = tuple(replace(entry, threat=ThreatModel("linf", 0.0)) for entry in SUITE.entries)
        report = attack("float", eps=0.0, preset=replace(SUITE, entries=entries, transfers=()))
        assert report.robust_accuracy == report.clean.value
        assert (report.masking, report.exit_code) == ("not checked", 0)
        assert "eps 0" in report.left_out[0]

    def test_the_first_images_under_the_default_eps_of_grey_ones(self, attack: Run) -> None:
        report = attack("float", eps=None, images=7)
        assert (report.threat, report.images) == ("linf 0.1", 7)


def qopt_seed(seed: int) -> int:
    from qopt.seeds import derive

    return derive(seed, "attack")


class TestGradients:
    def test_three_bits_attacked_honestly_and_naively(self, place: Path, attack: Run) -> None:
        data = labelled(place / "rounded.onnx")
        honest = attack("rounded", data=data)
        naive = attack("rounded", data=data, gradients="plain")
        assert honest.model.gradients == ["ste", "bpda"]
        assert (honest.masking, honest.exit_code) == ("none", 0)
        assert naive.model.gradients == ["plain"]
        assert (naive.masking, naive.exit_code) == ("masked", 1)
        assert naive.robust_accuracy > honest.robust_accuracy + 20
        assert "masked: this is no robustness" in naive.verdict
        assert "naive" in naive.warnings[0]
        triggered = {finding.rule for finding in naive.findings if finding.triggered}
        assert triggered >= {"zero_gradients", "unbounded_attack"}
        assert naive.findings[0].numbers == {"share": 1.0, "images": 30}

    def test_both_ways_are_taken_and_the_worst_counts(
        self, place: Path, attack: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, found = labelled(place / "rounded.onnx"), {}
        for name, ways in {"ste": ("ste",), "bpda": ("bpda",), "both": ("ste", "bpda")}.items():
            monkeypatch.setattr(attack_rows, "MODES", {"honest": ways})
            found[name] = attack("rounded", data=data)
        for one, other, both in zip(*(found[name].rows for name in ("ste", "bpda", "both")), strict=True):
            assert both.accuracy.value <= min(one.accuracy.value, other.accuracy.value)

    def test_under_all_asks_the_second_only_about_what_the_first_left(self) -> None:
        seen: list[list[int]] = []

        class Planted:
            """Fools the images whose number the model names."""

            name = "planted"

            def __call__(self, model: Any, images: Any, labels: Any, threat: Any, **rest: Any) -> AttackResult:
                seen.append(rest["indices"].tolist())
                return AttackResult(images + 1, torch.tensor([i in model for i in rest["indices"].tolist()]))

        attack = UnderAll(Planted(), ({2, 3},))  # type: ignore[arg-type]
        images = torch.zeros(5, 1)
        found = attack({1, 2}, images, images.long().flatten(), THREAT, seed=0)  # type: ignore[arg-type]
        assert seen == [[0, 1, 2, 3, 4], [0, 3, 4]]
        assert found.fooled.tolist() == [False, True, True, True, False]
        assert attack.name == "planted"

    def test_a_foreign_quantized_file(self, place: Path, attack: Run) -> None:
        report = attack("foreign", data=labelled(place / "foreign.onnx"), sources=(Source(place / "float.onnx"),))
        assert report.model.gradients == ["ste", "bpda"]
        assert report.model.agreement is not None
        assert report.model.agreement >= 99
        assert report.robust_accuracy < report.clean.value
        assert [row.access for row in report.rows] == ["white", "white", "gray", "gray"]
        assert report.masking == "none"

    def test_what_only_the_twin_loses_is_found_in_the_file(self, place: Path, attack: Run) -> None:
        """Every success is one of the file: examples that are saved fool onnxruntime on their own."""
        for name in ("foreign", "rounded"):
            out = place / f"{name}.npz"
            report = attack(name, data=labelled(place / f"{name}.onnx"), save=out)
            with np.load(out) as file:
                fooled = file["fooled_by"] != ""
                right = answers(place / f"{name}.onnx", file["images"]) == file["labels"]
            assert not (fooled & right).any()
            assert 100 * right.mean() == pytest.approx(report.robust_accuracy)


class TestWithoutGradients:
    def test_queries_and_transfers_only(self, place: Path, attack: Run) -> None:
        data = labelled(place / "refused.onnx")
        report = attack("refused", data=data, sources=(Source(place / "float.onnx"),))
        assert [(row.attack, row.access) for row in report.rows] == [
            ("Square-40", "queries"), ("PGD-6", "black"), ("MIM-6", "black"),
        ]  # fmt: skip
        assert report.rows[0].fooled > 0
        assert report.robust_accuracy < report.clean.value
        assert (report.masking, report.findings, report.exit_code) == ("not checked", [], 0)
        assert (report.model.gradients, report.model.agreement) == ([], None)
        assert "CenterCropPad" in report.model.no_gradients
        assert "attacks by gradients (FGSM, PGD-6) and the masking rules" in report.left_out[0]
        assert "an attacker who has them may do better" in report.verdict

    def test_the_same_network_answers_queries_alike(self, place: Path, attack: Run) -> None:
        """The refused operator does nothing: Square finds what it finds on the network without it."""
        data, entries = labelled(place / "float.onnx"), SUITE.blind
        refused = attack("refused", data=data)
        known = attack("float", data=data, preset=replace(SUITE, entries=entries))
        assert refused.rows[0] == known.rows[0]

    def test_a_suite_without_queries_is_refused(self, attack: Run) -> None:
        with pytest.raises(UsageError, match="no attack of the preset can be made on a model without gradients"):
            attack("refused", preset=replace(SUITE, blind=()))


class TestSources:
    def test_access_follows_the_structure(self, place: Path, attack: Run) -> None:
        sources = (Source(place / "rounded.onnx"), Source(place / "other.onnx"))
        report = attack("float", sources=sources)
        assert [(row.access, row.source) for row in report.rows[2:]] == [
            ("gray", "rounded"), ("gray", "rounded"), ("black", "other"), ("black", "other"),
        ]  # fmt: skip
        assert "transfer_stronger" in {finding.rule for finding in report.findings}
        assert report.rows[2].fooled > report.rows[4].fooled

    def test_examples_are_made_on_the_source_and_judged_by_the_file(self, place: Path, attack: Run) -> None:
        data = labelled(place / "float.onnx")
        images, labels = torch.from_numpy(data.report.images), torch.from_numpy(data.report.labels)
        source = open_subject(place / "rounded.onnx", Normalisation())
        made = PGD(steps=6, compact=False)(
            source.gradients, images, labels, THREAT, seed=qopt_seed(0), indices=torch.arange(30)
        ).adversarial
        expected = (answers(place / "float.onnx", made.numpy()) == labels.numpy())[3:].sum()
        row = attack("float", sources=(Source(place / "rounded.onnx"),)).rows[2]
        assert row.accuracy.value == pytest.approx(100 * expected / 30)

    def test_an_eps_of_its_own(self, place: Path, attack: Run) -> None:
        report = attack("float", sources=(Source(place / "rounded.onnx", 0.2), Source(place / "rounded.onnx", 0.01)))
        large, small = report.rows[2], report.rows[4]
        assert (large.eps, large.counts, small.eps, small.counts) == (0.2, False, 0.01, True)
        assert large.fooled > small.fooled
        assert large.mean_linf == pytest.approx(0.2, abs=1e-4)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("wide", "the source takes other images (expected (1, 6, 6), got (1, 7, 7))"),
            ("classes", "the source has other classes (expected 4, got 3)"),
            ("refused", "examples cannot be made on a source without gradients"),
            ("missing", "no such model file"),
        ],
    )
    def test_sources_that_do_not_fit(self, place: Path, attack: Run, name: str, words: str) -> None:
        steps: list[str] = []
        with pytest.raises((UsageError, ModelError)) as found:
            attack("float", progress=steps.append, sources=(Source(place / f"{name}.onnx"),))
        assert steps == ["load the model", f"load {name}.onnx"], "before any attack"
        assert words in str(found.value)
        assert f"{name}.onnx" in str(found.value)

    def test_reading(self, tmp_path: Path) -> None:
        (tmp_path / "net@2").write_text("")
        assert Source.parse("a/b.onnx") == Source(Path("a/b.onnx"))
        assert Source.parse("a/b.onnx@8/255") == Source(Path("a/b.onnx"), 8 / 255)
        assert Source.parse(f"{tmp_path}/net@2") == Source(tmp_path / "net@2"), "a file of that name"
        with pytest.raises(UsageError, match=r"--source b.onnx@x: eps is not a number"):
            Source.parse("b.onnx@x")


class TestTheSameResult:
    def test_whatever_the_batch_and_the_chunk(self, attack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        noise = Entry(Unbounded(GaussianNoise(0.2)), None)
        suite = replace(SUITE, entries=(*SUITE.entries, *SUITE.blind, noise, Entry(SPSA(steps=2, samples=8), THREAT)))
        expected = attack("rounded", preset=suite)
        for batch, chunk in ((1, 100), (7, 11), (64, 1)):
            monkeypatch.setattr(attack_rows, "CHUNK", chunk)
            assert attack("rounded", preset=suite, batch=batch) == expected

    def test_and_another_for_another_seed(self, attack: Run) -> None:
        suite = replace(SUITE, entries=(Entry(Unbounded(GaussianNoise(0.3)), None),))
        found = [attack("float", preset=suite, seed=seed).rows[0].mean_l2 for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]

    def test_an_interrupted_run_goes_on(self, tmp_path: Path, attack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attack_rows, "CHUNK", 10)
        expected, steps = attack("rounded"), list[str]()

        def interrupt(step: str) -> None:
            steps.append(step)
            if step.startswith("PGD-6 (linf 0.06): 20 of 30"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            attack("rounded", Cache(tmp_path), interrupt)
        assert len(list((tmp_path / "attack").iterdir())) == 5, "three chunks of FGSM, two of PGD"
        assert steps[1] == "FGSM (linf 0.06): 0 of 30 images, robust accuracy so far 83.3 %"
        cache = Cache(tmp_path)
        assert attack("rounded", cache) == expected
        assert cache.hits == ["attack"] * 5
        again = Cache(tmp_path)
        assert attack("rounded", again) == expected
        assert again.hits == ["attack"] * 6 + ["masking"]

    def test_the_cache_knows_what_makes_a_difference(self, place: Path, tmp_path: Path, attack: Run) -> None:
        attack("rounded", Cache(tmp_path))
        labels = labelled(place / "float.onnx", wrong=4)
        suites = replace(SUITE, entries=(Entry(FGSM("margin"), THREAT), Entry(PGD(steps=7), THREAT)))
        different: list[dict[str, Any]] = [
            {"seed": 1}, {"eps": 0.05}, {"images": 29}, {"data": labels}, {"preset": suites}, {"gradients": "plain"},
            {"normalisation": Normalisation((0.0,), (0.9,))}, {"save": tmp_path / "x.npz"},
        ]  # fmt: skip
        for options in different:
            cache = Cache(tmp_path)
            attack("rounded", cache, **options)
            assert "attack" not in cache.hits, options
        cache = Cache(tmp_path)
        attack("float", cache)
        assert cache.hits == []
        cache = Cache(tmp_path)
        attack("rounded", cache, batch=3)
        assert cache.hits == ["attack", "attack", "masking"]


class TestExamples:
    def test_what_is_saved(self, place: Path, tmp_path: Path, attack: Run) -> None:
        out = tmp_path / "adversarial.npz"
        report = attack("float", save=out, sources=(Source(place / "rounded.onnx"),))
        data = labelled(place / "float.onnx").report
        with np.load(out) as file:
            images, labels, names = file["images"], file["labels"], file["fooled_by"]
        assert (images.dtype, images.shape) == (np.float32, (30, 1, 6, 6))
        np.testing.assert_array_equal(labels, data.labels)
        fooled = names != ""
        assert not fooled[:3].any(), "these were wrong from the start"
        np.testing.assert_array_equal(images[~fooled], data.images[~fooled])
        assert np.abs(images - data.images).max() <= THREAT.eps + 1e-6
        right = answers(place / "float.onnx", images) == labels
        assert 100 * right.mean() == pytest.approx(report.robust_accuracy)
        assert set(names[fooled]) <= {"FGSM (linf 0.06)", "PGD-6 (linf 0.06)"}

    def test_the_report_is_the_same_with_them_from_the_cache_too(self, tmp_path: Path, attack: Run) -> None:
        for name in ("a", "b"):
            assert attack("rounded", Cache(tmp_path / "cache"), save=tmp_path / f"{name}.npz") == attack("rounded")
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()

    @pytest.mark.parametrize(("where", "words"), [("none/x.npz", "no such folder"), (".", "a folder and not a file")])
    def test_a_place_that_nothing_can_be_written_to_is_refused_upfront(
        self, tmp_path: Path, attack: Run, where: str, words: str
    ) -> None:
        steps: list[str] = []
        with pytest.raises(UsageError, match=words):
            attack("float", progress=steps.append, save=tmp_path / where)
        assert steps == []


class TestWarningsAndErrors:
    def test_probabilities(self, attack: Run) -> None:
        assert "softmax-output" in attack("softmax").warnings[0]
        assert attack("float").warnings == []

    def test_hardly_more_than_chance(self, place: Path, attack: Run) -> None:
        report = attack("float", data=labelled(place / "float.onnx", wrong=25))
        assert "hardly more than chance among 4 classes" in report.warnings[0]

    def test_file_and_twin_that_differ(self, attack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qopt.job.attack_report.AGREEMENT", 101.0)
        assert "file and twin predict the same class on 100.0 %" in attack("float").warnings[0]

    def test_labels_out_of_range(self, place: Path, attack: Run) -> None:
        data = labelled(place / "float.onnx")
        data.report.labels[4] = 4
        with pytest.raises(DataError, match="image 4: label out of range"):
            attack("float", data=data)

    def test_logits_that_are_not_finite(self, attack: Run) -> None:
        with pytest.raises(ModelError, match="logit that is not finite"):
            attack("broken")

    def test_pixels_outside_the_box(self, place: Path, attack: Run) -> None:
        data = labelled(place / "float.onnx")
        data.report.images[2] += 1
        with pytest.raises(DataError, match="image 2: pixel values outside the box"):
            attack("float", data=data)

    def test_images_of_another_size(self, attack: Run) -> None:
        with pytest.raises(DataError, match="images do not fit the network"):
            attack("wide")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"images": 0}, "--images: must be at least 1"),
            ({"batch": 0}, "--batch: must be at least 1"),
            ({"threads": 0}, "--threads: must be at least 1"),
            ({"gradients": "ste"}, "--gradients: unknown word"),
            ({"preset": "fast"}, "--preset: unknown preset"),
            ({"norm": "l1"}, "--norm: unknown norm"),
            ({"eps": -1.0}, "--eps: eps must be a finite number"),
            ({"eps": float("nan")}, "--eps: eps must be a finite number"),
        ],
    )
    def test_wrong_options(self, attack: Run, options: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            attack("float", **options)


def test_the_python_call(place: Path, tmp_path: Path) -> None:
    report = qopt.attack(
        place / "float.onnx", data=labelled(place / "float.onnx"), eps="0.06", preset=SUITE, cache=tmp_path / "cache",
        sources=(f"{place / 'rounded.onnx'}@0.02",), mean=(0.0,), std=(1.0,), save=tmp_path / "x.npz",
    )  # fmt: skip
    assert [row.eps for row in report.rows] == [0.06, 0.06, 0.02, 0.02]
    assert AttackReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(("preset", "count"), [("quick", 8), ("standard", 3)])
def test_presets_by_name(place: Path, preset: str, count: int) -> None:
    data = labelled(place / "rounded.onnx", count, 1)
    report = qopt.attack(place / "rounded.onnx", data=data, eps=0.03, preset=preset)
    assert report.preset == preset
    assert report.in_turn is (preset == "standard")
    assert report.robust_accuracy <= min(row.accuracy.value for row in report.rows)


def test_the_embedded_example(examples: Path, example_onnx: Path, fashion: Data) -> None:
    """Trained to withstand: most of it does, and nothing is masked."""
    suite = replace(SUITE, entries=(Entry(FGSM(), ThreatModel("linf", 0.1)),))
    report = attack_model(
        AttackTask(example_onnx, fashion, eps=0.1, images=30, preset=suite), Cache(None), lambda step: None
    )
    assert report.clean.value > 80
    assert report.robust_accuracy > 60
    assert report.masking == "none"
