"""The report's worst pair sums, and the warning that names the layers that x86 without VNNI saturates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qopt
from qopt.data import Data
from qopt.plan import Defaults, Plan


@pytest.fixture(scope="module")
def reports(example_onnx: Path, fashion: Data) -> dict[str, qopt.Bundle]:
    few: dict[str, Any] = {"attack_images": 1, "probe_images": 8, "calibration_images": 32, "baselines": ()}
    return {
        weights: qopt.optimize(
            example_onnx, data=fashion, plan=Plan(defaults=Defaults(weights=weights, activations="int8")), **few
        )
        for weights in ("int8:max", "int7:max")
    }  # fmt: skip


def warnings_of(bundle: qopt.Bundle) -> list[str]:
    return [text for text in bundle.report.warnings if "VNNI" in text]


def test_eight_bits_are_warned_of_by_layer(reports: dict[str, qopt.Bundle]) -> None:
    bundle = reports["int8:max"]
    over = [row.name for row in bundle.report.layers if (row.worst_pair_sum or 0) > 32767]
    assert over
    (warning,) = warnings_of(bundle)
    assert all(name in warning for name in over)
    assert str(max(row.worst_pair_sum or 0 for row in bundle.report.layers)) in warning
    assert "session.x64quantprecision" in warning


def test_seven_bits_are_safe(reports: dict[str, qopt.Bundle]) -> None:
    bundle = reports["int7:max"]
    assert all(row.worst_pair_sum is not None for row in bundle.report.layers)
    assert all((row.worst_pair_sum or 0) <= 2 * 63 * 255 for row in bundle.report.layers)
    assert not warnings_of(bundle)


def test_the_sums_are_those_of_the_codes_in_the_file(reports: dict[str, qopt.Bundle]) -> None:
    bundle = reports["int8:max"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(bundle.model).graph.initializer}
    row = next(row for row in bundle.report.layers if len(row.shape) == 4)
    codes = np.moveaxis(stored[f"{row.name}/codes"].astype(np.int64), 1, -1).reshape(row.shape[0], -1)
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).reshape(-1, 2)
    expected = max(np.abs(np.maximum(codes, 0).sum(1)).max(), np.abs(np.minimum(codes, 0).sum(1)).max()) * 255
    assert row.worst_pair_sum == expected


def test_the_table_shows_them(reports: dict[str, qopt.Bundle]) -> None:
    text = reports["int8:max"].files()["report.md"].decode().partition("## Layers")[2]
    header = next(line for line in text.splitlines() if "pair sum" in line)
    column = [cell.strip() for cell in header.split(" | ")].index("pair sum")
    for row in reports["int8:max"].report.layers:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.name} |"))
        assert line.split(" | ")[column].strip() == str(row.worst_pair_sum)
