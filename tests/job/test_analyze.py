"""Analyses of whole files: numbers against numpy and torch, planted layers, what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qopt.api import analyze
from qopt.cache import Cache
from qopt.data import Data, Split
from qopt.errors import CorruptModelError, DataError, ModelError, PlanError, UnsupportedModelError, UsageError
from qopt.graph.to_onnx import module_to_onnx
from qopt.job.analysis_formats import analysed_formats
from qopt.job.analysis_ranking import correlations, quantity_of
from qopt.job.analyze import AnalyzeTask, analyze_model
from qopt.measure.ranks import spearman
from qopt.quant.large import quantize_large
from qopt.report.analysis_report import AnalysisReport, LayerFacts
from qopt.runtime.session import to_bytes
from qopt.search.thresholds import paper_thresholds
from qopt.spec import WeightSpec

Text = Callable[..., onnx.ModelProto]

FORMATS = ("int2:tensor:max", "int4", "log4")
COUNT = 40


def network() -> Any:
    """A sequence of layers, whose weights tests change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made: Any = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4),
        )  # fmt: skip
    with torch.no_grad():  # so that all classes are predicted, and some clearly
        made[-1].weight.mul_(20)
        made[-1].bias.copy_(-(made[-1](made[:-1](pictures())).mean(0)) + made[-1].bias)
    return made.eval()


def pictures(seed: int = 5) -> torch.Tensor:
    return torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def part(seed: int, module: Any = None) -> Split:
    images = pictures(seed)
    with torch.no_grad():
        labels = (module or network())(images).argmax(1)
    return Split(images.numpy(), labels.numpy().astype(np.int64))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("analyze") / "small.onnx"
    path.write_bytes(to_bytes(module_to_onnx(network(), (1, 8, 8))))
    return path


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(part(5), part(6), part(7))


@pytest.fixture(scope="module")
def report(file: Path, data: Data) -> AnalysisReport:
    return analyze(file, data=data, eps=0.03, formats=FORMATS, images=COUNT)


@pytest.fixture(scope="module")
def bare(file: Path) -> AnalysisReport:
    return analyze(file, formats=FORMATS)


def weights() -> dict[str, torch.Tensor]:
    return {f"{i}.weight": layer.weight.detach() for i, layer in enumerate(network()) if hasattr(layer, "weight")}


def rounded_to_nearest(weight: torch.Tensor, text: str) -> torch.Tensor:
    return quantize_large(weight, WeightSpec.parse(text), 0, where="weight").dequantize()


def matrix_norm(weight: torch.Tensor, groups: int) -> float:
    blocks = np.split(weight.double().numpy().reshape(len(weight), -1), groups)
    return max(float(np.linalg.norm(block, 2)) for block in blocks)


def test_the_norms_are_those_of_numpy(bare: AnalysisReport) -> None:
    found = weights()
    assert [layer.name for layer in bare.layers] == list(found)
    for layer in bare.layers:
        weight = found[layer.name]
        assert layer.shape == list(weight.shape)
        assert layer.weights == weight.numel()
        assert layer.weight_range.low == float(weight.min())
        assert layer.weight_range.high == float(weight.max())
        norm = matrix_norm(weight, layer.groups)
        assert layer.reshaped.lower <= norm * (1 + 1e-12) <= layer.reshaped.upper * (1 + 2e-12)
        assert (layer.threshold_wq, layer.threshold_dw) == paper_thresholds(layer.reshaped.upper)
        assert layer.operator_l2 is not None
        assert layer.operator_linf is not None
        assert layer.operator_l2.upper >= layer.reshaped.lower
        assert (layer.operator_l2 == layer.reshaped) == (layer.op == "Gemm")
    assert [layer.groups for layer in bare.layers] == [1, 2, 1, 1]
    assert [layer.macs for layer in bare.layers] == [576, 432, 288, 48]


def test_the_candidates_are_those_that_nearest_rounding_makes(bare: AnalysisReport) -> None:
    for layer in bare.layers:
        weight = weights()[layer.name]
        assert [candidate.format for candidate in layer.candidates] == list(FORMATS)
        for candidate in layer.candidates:
            rounded = rounded_to_nearest(weight, candidate.format)
            norm, error = matrix_norm(rounded, layer.groups), matrix_norm(weight.double() - rounded, layer.groups)
            for bound, value in ((candidate.norm_wq, norm), (candidate.norm_dw, error)):
                assert bound.lower * (1 - 1e-9) <= value <= bound.upper * (1 + 1e-9)
            assert candidate.paper == pytest.approx(max(norm / layer.threshold_wq, error / layer.threshold_dw))
            assert candidate.relative == pytest.approx(error / matrix_norm(weight, layer.groups))


def test_without_data_there_are_norms_alone(bare: AnalysisReport) -> None:
    assert (bare.images, bare.threat, bare.norm, bare.eps, bare.clean_loss) == (0, None, None, None, None)
    assert (bare.adversarial_loss, bare.robust_loss, bare.correlations) == (None, None, [])
    for layer in bare.layers:
        assert (layer.input, layer.output) == (None, None)
        assert all(c.measured is None and c.weighted is None for c in layer.candidates)
    assert "is measured with --data" in bare.verdict


def test_what_data_adds(report: AnalysisReport, bare: AnalysisReport, data: Data) -> None:
    assert (report.images, report.norm, report.eps, report.threat) == (COUNT, "linf", 0.03, "linf 0.03")
    for layer, plain in zip(report.layers, bare.layers, strict=True):
        assert (layer.reshaped, layer.operator_l2) == (plain.reshaped, plain.operator_l2)
        assert [c.norm_dw for c in layer.candidates] == [c.norm_dw for c in plain.candidates]
        assert all(c.weighted is not None and c.measured is not None for c in layer.candidates)
    images, labels = torch.from_numpy(data.select.images), torch.from_numpy(data.select.labels)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(network()(images), labels))
    assert report.clean_loss == pytest.approx(loss, rel=1e-4)
    assert report.adversarial_loss is not None
    assert report.robust_loss is not None
    assert report.clean_loss is not None
    assert report.clean_loss <= report.robust_loss <= report.adversarial_loss


def test_the_loss_of_a_layer_rounded_by_hand(report: AnalysisReport, data: Data) -> None:
    images, labels = torch.from_numpy(data.select.images), torch.from_numpy(data.select.labels)
    for layer in report.layers:
        for candidate in layer.candidates:
            module = network()
            with torch.no_grad():
                weight = dict(module.named_parameters())[layer.name]
                weight.copy_(rounded_to_nearest(weight.clone(), candidate.format))
                loss = float(nn.functional.cross_entropy(module(images), labels))
            assert candidate.measured is not None
            assert report.clean_loss is not None
            assert candidate.measured.clean_loss == pytest.approx(loss - report.clean_loss, abs=1e-5)


def test_ranges_and_amplification(report: AnalysisReport) -> None:
    first, last = report.layers[0], report.layers[-1]
    assert first.input is not None
    assert last.output is not None
    assert 0 <= first.input.range.low < first.input.range.high <= 1
    most = 0.03 * 8 / pictures(5).flatten(1).norm(dim=1).mean()  # every pixel by eps
    assert first.input.amplification is not None
    assert 0.3 * most < first.input.amplification < 1.05 * most
    with torch.no_grad():
        logits = network()(pictures(5))
    assert last.output.range.low <= float(logits.min())
    assert last.output.range.high >= float(logits.max())


def test_the_correlations(report: AnalysisReport) -> None:
    rows = {(row.quantity, row.format): row for row in report.correlations}
    assert len(rows) == 4 * (len(FORMATS) + 1)
    for (quantity, name), row in rows.items():
        chosen = [c for layer in report.layers for c in layer.candidates if name in ("", c.format)]
        assert row.pairs == len(chosen)
        measured = [getattr(c.measured, quantity) for c in chosen]
        assert row.paper == spearman([c.norm_dw.upper for c in chosen], measured)
        assert row.relative == spearman([c.relative for c in chosen], measured)
        assert row.weighted == spearman([quantity_of(c, "weighted") or 0.0 for c in chosen], measured)


def planted(report: AnalysisReport, harm: list[float]) -> list[LayerFacts]:
    """The layers, with the first format's robust loss as it is told."""
    found = []
    for layer, loss in zip(report.layers, harm, strict=True):
        first = layer.candidates[0]
        assert first.measured is not None
        measured = first.measured.model_copy(update={"robust_loss": loss})
        found.append(layer.model_copy(update={"candidates": [first.model_copy(update={"measured": measured})]}))
    return found


def test_planted_harm_is_ranked(report: AnalysisReport) -> None:
    by_weight = [layer.candidates[0].weighted for layer in report.layers]
    values = [bound.upper for bound in by_weight if bound is not None]
    row = correlations(planted(report, values))[0]
    assert (row.quantity, row.weighted) == ("robust_loss", 1.0)
    row = correlations(planted(report, [-value for value in values]))[0]
    assert row.weighted == -1.0
    assert correlations(planted(report, [0.5] * 4))[0].weighted is None
    assert correlations([]) == []


def test_a_planted_layer_hurts_most(tmp_path: Path) -> None:
    """An outlier that meets only zeros: with one scale for all, the other weights of its layer round to zero.

    Of the three quantities the weighted error alone knows that the outlier does not count.
    """
    module = network()
    with torch.no_grad():
        module[5].bias[0] = -1e3  # the first hidden unit is always off
        module[7].weight[0, 0] = 2000
    path = tmp_path / "planted.onnx"
    path.write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    data = Data(part(5, module), part(6, module), part(7, module))
    found = analyze(path, data=data, eps=0.001, formats=("int8:tensor:max", "int4"), images=COUNT)
    rows = {(layer.name, c.format): c for layer in found.layers for c in layer.candidates}
    losses = {pair: row.measured.robust_loss for pair, row in rows.items() if row.measured}
    worst = ("7.weight", "int8:tensor:max")
    assert losses[worst] > 0.1
    assert sorted(losses, key=lambda pair: -losses[pair])[0][0] == "7.weight"
    assert "7.weight in " in found.verdict
    assert rows[worst].relative < 0.02
    bound = rows[worst].weighted
    assert bound is not None
    assert bound.lower == pytest.approx(1, abs=1e-3)


def test_the_same_twice_and_from_the_cache(report: AnalysisReport, file: Path, data: Data, tmp_path: Path) -> None:
    task = AnalyzeTask(file, data, eps=0.03, formats=FORMATS, images=COUNT)
    for _ in range(2):
        cache = Cache(tmp_path)
        assert analyze_model(task, cache, lambda step: None).to_json() == report.to_json()
    assert {"analysis", "adversarial", "norms", "operator-norms"} <= set(cache.hits)


def test_the_formats_of_the_target_by_default(file: Path) -> None:
    found = analyze(file, target="int8")
    assert found.formats == ["int8"]
    assert [c.format for layer in found.layers for c in layer.candidates] == ["int8"] * 4


def test_the_other_norm_and_normalisation(file: Path, data: Data) -> None:
    found = analyze(file, data=data, norm="l2", eps="1/4", formats=("int4",), images=8, mean=(0.5,), std=(0.5,))
    assert (found.threat, found.images) == ("l2 0.25", 8)
    first = found.layers[0].input
    assert first is not None
    assert first.range.low < 0


def test_one_part_serves_all_and_says_so(file: Path, data: Data) -> None:
    note = "x alone serves calibration, selection and report"
    alone = Data(data.report, data.report, data.report, (note,))
    assert note in analyze(file, data=alone, formats=("int4",), images=8).notes


def test_a_network_that_takes_no_images_has_norms(text_model: Text, tmp_path: Path, data: Data) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "t": rng.standard_normal((50, 16)).astype(np.float32),
        "w": rng.standard_normal((16, 9)).astype(np.float32),
    }
    graph = "net (int64[n,4] ids) => (float[n,4,9] y) { e = Gather (t, ids)\n y = MatMul (e, w) }"
    path = tmp_path / "text.onnx"
    path.write_bytes(text_model(graph, **arrays).SerializeToString())
    found = analyze(path, formats=("int4", "int8"))
    assert [(layer.op, layer.shape) for layer in found.layers] == [("Gather", [50, 16]), ("MatMul", [16, 9])]
    table, product = found.layers
    assert table.operator_l2 is not None
    assert table.operator_l2.method == "longest row"
    assert product.reshaped.upper == pytest.approx(np.linalg.norm(arrays["w"].astype(np.float64), 2))
    with pytest.raises(DataError, match="network that does not"):
        analyze(path, data=data, formats=("int4",))


def test_zeros_have_finite_facts(data: Data, tmp_path: Path) -> None:
    module = network()
    with torch.no_grad():
        module[2].weight.zero_()
    path = tmp_path / "zeros.onnx"
    path.write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    names = ("int1", "log1:tensor:max", "int2:tensor:max", "log3", "ternary", "int4:asym", "int4:tensor")
    found = analyze(path, data=data, formats=names, images=8)
    for candidate in found.layers[1].candidates:
        assert (candidate.norm_dw.upper, candidate.paper, candidate.relative) == (0.0, 0.0, 0.0)
        assert candidate.measured is not None
        assert candidate.measured.robust_loss == pytest.approx(0, abs=1e-6)
    assert json.loads(found.to_json())["layers"][1]["operator_l2"]["upper"] == 0


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"formats": ("int9",)}, PlanError, "--formats: not a weight format"),
    ({"formats": ("int4:max:max",)}, PlanError, "--formats: unknown or repeated option"),
    ({"formats": ("int4", "float")}, UsageError, "not a candidate for every layer"),
    ({"formats": ("rows(int4*3,int8)",)}, UsageError, "not a candidate for every layer"),
    ({"formats": ("nothing@4",)}, UsageError, "nothing"),
    ({"target": "int5"}, UsageError, "unknown target"),
    ({"target": "int5", "formats": ("int4",)}, UsageError, "unknown target"),
    ({"images": 0}, UsageError, "--images: must be at least 1"),
    ({"eps": float("nan")}, UsageError, "eps must be a finite number"),
    ({"eps": float("inf")}, UsageError, "eps must be a finite number"),
    ({"eps": "x"}, UsageError, "eps is not a number"),
    ({"norm": "l1"}, UsageError, "unknown norm"),
    ({"mean": (0.5,), "std": (0.0,)}, UsageError, "std must be positive"),
]


@pytest.mark.parametrize(("options", "error", "match"), WRONG)
def test_wrong_options(file: Path, data: Data, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        analyze(file, data=data, **options)


def test_formats_are_taken_once() -> None:
    assert [str(spec) for spec in analysed_formats("int4", ("int4", "log4", "int4"))] == ["int4", "log4"]


def test_images_and_labels_that_do_not_fit(file: Path, data: Data) -> None:
    wide = Split(np.zeros((4, 1, 9, 9), np.float32), np.zeros(4, np.int64))
    with pytest.raises(DataError, match="do not fit the network"):
        analyze(file, data=Data(wide, wide, wide))
    other = Split(data.select.images, data.select.labels + 4)
    with pytest.raises(DataError, match="labels out of range"):
        analyze(file, data=Data(data.calibrate, other, data.report))


def test_files_that_cannot_be_analysed(tmp_path: Path, data: Data) -> None:
    with pytest.raises(UsageError, match=r"none\.onnx"):
        analyze(tmp_path / "none.onnx")
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(ModelError, match=r"text\.txt"):
        analyze(tmp_path / "text.txt")
    path = tmp_path / "plain.onnx"
    path.write_bytes(to_bytes(module_to_onnx(nn.Sequential(nn.Flatten(), nn.Softmax(1)), (1, 8, 8))))
    with pytest.raises(UnsupportedModelError, match="no layer that can be quantized"):
        analyze(path, data=data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(tmp_path: Path, value: float) -> None:
    module = network()
    with torch.no_grad():
        module[5].weight[3, 2] = value
    path = tmp_path / "broken.onnx"
    path.write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    with pytest.raises(CorruptModelError, match=r"5\.weight"):
        analyze(path)
