"""Certificates of files: what is proved is never more than what attacks leave, and reports say what they rest on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qopt
from qopt.api import certify as certify_file
from qopt.certificates.certificate import certify, tried
from qopt.data import Data, Split
from qopt.errors import DataError, UnsupportedModelError, UsageError, VerificationError
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import module_to_onnx
from qopt.graph.twin import build_twin
from qopt.report.certify_report import CertifyReport, show_certificates
from qopt.report.schemas import schema
from qopt.runtime.session import to_bytes
from qopt.threat import ThreatModel

EPS = 0.004
COUNT = 60


def network(seed: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(),
        )  # fmt: skip
        last = nn.Linear(12, 4)
    features = made(pictures()).detach()
    with torch.no_grad():  # so that all classes are predicted
        last.bias.sub_(last(features).mean(0))
    return nn.Sequential(*made, last).eval()


def pictures() -> torch.Tensor:
    return torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certify") / "small.onnx"
    path.write_bytes(to_bytes(module_to_onnx(network(), (1, 8, 8))))
    return path


@pytest.fixture(scope="module")
def data() -> Data:
    images = pictures()
    with torch.no_grad():
        labels = network()(images).argmax(1)
    labels[:6] = (labels[:6] + 1) % 4
    part = Split(images.numpy(), labels.numpy().astype(np.int64))
    return Data(part, part, part)


@pytest.fixture(scope="module")
def report(file: Path, data: Data) -> CertifyReport:
    return certify_file(file, data=data, eps=EPS, radius=True)


def test_the_figures(report: CertifyReport, file: Path, data: Data) -> None:
    images, labels = torch.from_numpy(data.report.images), torch.from_numpy(data.report.labels)
    graph = build_twin(prepare(load_model(file)))
    own = certify(graph, images, labels, ThreatModel("linf", EPS))
    assert report.certified_accuracy == pytest.approx(100 * own.accuracy)
    assert 0 < report.certified_accuracy <= report.attacked.value <= report.clean.value
    assert report.clean.value == pytest.approx(90.0)
    assert report.spared == pytest.approx(100 * report.certified_accuracy / report.clean.value, abs=1e-3)
    assert report.radius is not None
    assert 0 < report.radius <= EPS
    assert [row.method for row in report.methods] == ["interval", "backward-interval", "backward"]
    values = [row.certified.value for row in report.methods]
    assert values == sorted(values)
    assert values[-1] == report.certified_accuracy


def test_what_the_report_says(report: CertifyReport) -> None:
    text = show_certificates(report)
    for word in ("small", "linf 0.004", "backward-interval", "integer kernels", f"{report.certified_accuracy:.1f} %"):
        assert word in text
    assert text.endswith(report.verdict + "\n")
    assert CertifyReport.from_json(report.to_json()) == report
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(report.to_json()), schema("certificates"))


def test_the_same_twice_and_from_the_cache(report: CertifyReport, file: Path, data: Data, tmp_path: Path) -> None:
    for _ in range(2):
        again = certify_file(file, data=data, eps=EPS, radius=True, cache=tmp_path)
        assert again.to_json() == report.to_json()
    assert list(tmp_path.rglob("*.npz"))


def test_fewer_images_and_cheaper_bounds(file: Path, data: Data) -> None:
    found = certify_file(file, data=data, eps=EPS, images=20, method="interval")
    assert found.images == 20
    assert [row.method for row in found.methods] == ["interval"]
    assert found.radius is None


def test_the_other_norm_and_an_empty_ball(file: Path, data: Data, report: CertifyReport) -> None:
    l2 = certify_file(file, data=data, norm="l2", eps=0.02)
    assert 0 < l2.certified_accuracy <= l2.attacked.value
    point = certify_file(file, data=data, eps=0.0)
    # a tie within rounding is never certified
    assert report.certified_accuracy <= point.certified_accuracy <= point.clean.value


def test_a_quantized_file(file: Path, data: Data, tmp_path: Path) -> None:
    bundle = qopt.optimize(file, data=data, target="int4", activations="int8", effort="fast", baselines=(), gates=())
    path = tmp_path / "model.onnx"
    path.write_bytes(bundle.model)
    found = certify_file(path, data=data, eps=0.001)
    assert 0 < found.certified_accuracy <= found.attacked.value <= found.clean.value


def test_an_unsound_bound_is_found_out(file: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(twin: Any, images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel, *, method: Any) -> Any:
        del twin, labels, threat
        return dict.fromkeys(tried(method), torch.ones(len(images), dtype=torch.float64))

    monkeypatch.setattr("qopt.job.certify.margins_by_method", wrong)
    with pytest.raises(VerificationError, match="broke an image that was certified"):
        certify_file(file, data=data, eps=0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "crown"}, "unknown method"),
        ({"images": 0}, "at least 1"),
        ({"eps": "abc"}, "eps is not a number"),
        ({"norm": "l1"}, "unknown norm"),
    ],
)
def test_wrong_options(file: Path, data: Data, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        certify_file(file, data=data, **options)


def test_labels_of_other_classes(file: Path, data: Data) -> None:
    part = Split(data.report.images, data.report.labels + 4)
    with pytest.raises(DataError, match="label out of range"):
        certify_file(file, data=Data(part, part, part))


def test_an_operator_without_bounds(tmp_path: Path, data: Data) -> None:
    path = tmp_path / "other.onnx"
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Softmax(1), nn.Linear(8, 4)).eval()
    path.write_bytes(to_bytes(module_to_onnx(module, (1, 8, 8))))
    with pytest.raises(UnsupportedModelError, match="Softmax"):
        certify_file(path, data=data, eps=EPS)
