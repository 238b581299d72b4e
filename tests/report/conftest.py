"""A small report made by hand, with every part filled."""

from __future__ import annotations

import pytest

from qopt.report.model import (
    ActivationRow,
    DataFacts,
    Drop,
    ErrorAmplification,
    EvaluatedPlan,
    GateRow,
    KernelFacts,
    LayerErrors,
    LayerRow,
    LimitRow,
    MaskingRow,
    MeasuredPlan,
    ModelFacts,
    Report,
    Row,
    SearchFacts,
    Share,
    SizeFacts,
    SweepLine,
    SweepPoint,
    Transfers,
)


def share(value: float) -> Share:
    return Share(value=value, low=value - 2, high=value + 2, n=100)


def drop(value: float) -> Drop:
    return Drop(value=value, standard_error=0.5, low=value - 1, high=value + 1, n=100)


@pytest.fixture
def full_report() -> Report:
    return Report(
        verdict="net in 3.50 bits per weight; gates fail: robust_drop<=2.",
        robust_accuracy=60.0,
        target="int4: weights int2, int4; activations int8; bits<=4",
        command="qopt optimize net --target int4 --robust --data ... --seed 7",
        seed=7,
        threat="linf 8/255",
        model=ModelFacts(
            name="net", digest="ab", input="x", input_shape=[1, 28, 28], classes=10, batch=None, layers=2,
            weights=12345, notes=["batch norm folded"],
        ),
        data=DataFacts(digest="cd", calibrate=50, select=50, report=100, attacked=80, notes=["a note on data"]),
        search=SearchFacts(
            strategy="greedy", sensitivity="KL divergence", thresholds="weighted <= 0.25", factor=1.5,
            relaxed=["conv|1", "fc"], gap=0.01, notes=["a note on the search"],
            evaluated=[
                EvaluatedPlan(
                    name="greedy", digest="ef", code_bits=3.5, bias_correction=False, clean_divergence=0.012345,
                    adversarial_divergence=0.1, chosen=True, clean_drop=0.2, robust_drop=-0.4,
                ),
                EvaluatedPlan(
                    name="greedy, bias correction", digest="gh", code_bits=3.5, bias_correction=True,
                    clean_divergence=0.02, adversarial_divergence=None, chosen=False,
                ),
            ],
            measured=[
                MeasuredPlan(
                    code_bits=bits, bytes=5000, clean=clean, robust=0.1, front=front, knee=bits == 3.5,
                    chosen=bits == 3.5,
                )
                for bits, clean, front in ((3.5, 0.012345, True), (4.0, 0.01, True), (4.0, 0.5, False))
            ],
        ),
        layers=[
            LayerRow(
                name="conv|1", op="Conv", shape=[16, 1, 3, 3], format="int4:max", bits=4, container_bits=4,
                norm_w=1.23456, norm_wq=1.2, norm_dw=0.0345, row_norm_w=3.0, row_norm_dw=0.1, macs=112896,
                integer=True, reason="sensitivity 0.01", worst_pair_sum=7140,
            ),
            LayerRow(
                name="fc", op="Gemm", shape=[10, 64], format="float", bits=32, container_bits=32, norm_w=2.0,
                norm_wq=2.0, norm_dw=0.0, row_norm_w=5.0, row_norm_dw=0.0, macs=640, integer=False, reason="",
            ),
        ],
        activations=[ActivationRow(tensor="x", format="int8", low=0.0, high=1.0, scale=0.00392157, zero_point=0)],
        size=SizeFacts(float_bytes=50000, file_bytes=6000, ratio=0.12, code_bits=3.5, stored_bits=3.75),
        kernels=KernelFacts(
            integer=1, floating=1, counts={"QLinearConv": 1, "Gemm": 1}, agreement=0.995, difference=1e-3
        ),
        rows=[
            Row(name="float", code_bits=32.0, clean=share(90), attacked={"PGD-20": share(66)}, robust=share(65)),
            Row(
                name="qopt", code_bits=3.5, clean=share(89), attacked={"PGD-20": share(61), "transfer": share(70)},
                robust=share(60), clean_drop=drop(1), robust_drop=drop(5), masking="none",
            ),
            Row(
                name="qopt, naive evaluation", code_bits=3.5, clean=share(89), masking="masked",
                clean_drop=drop(-0.25), note="not a measurement",
            ),
        ],
        sweep=[
            SweepLine(
                network=name,
                points=[
                    SweepPoint(eps=0.0, accuracy=share(90)),
                    SweepPoint(eps=0.1, accuracy=share(held)),
                ],
            )
            for name, held in (("float", 70.0), ("qopt", 65.0))
        ],
        amplification=ErrorAmplification(
            images=64,
            layers=[
                LayerErrors(layer="conv|1", attack_float=0.125, attack=0.13, clean=0.0525, attacked=0.06),
                LayerErrors(layer="fc", attack_float=0.25, attack=0.3125, clean=0.0775, attacked=None),
            ],
        ),
        transfers=Transfers(
            images=64, networks=["float", "uniform int4:max, activations int4", "qopt"], clean=[10.0, 12.0, 11.0],
            fooled=[[35.0, 41.0, 36.0], [21.0, 61.0, 23.0], [30.0, 40.0, 38.0]],
            cosines=[[1.0, 0.5, 0.75], [0.5, 0.96875, -0.25], [0.75, -0.25, 1.0]],
        ),
        masking=[MaskingRow(network="qopt", rule="transfer beats\nwhite box", triggered=True, text="70.0 | 61.0")],
        gates=[
            GateRow(gate="clean_drop<=2", found="1.00 points, at most 2.00 at 95 %", holds=True),
            GateRow(gate="robust_drop<=2", found="5.00 points, at most 6.00 at 95 %", holds=False),
        ],
        limits=[
            LimitRow(limit="bits<=4", machine="stored", value=3.5, bound=4, found="3.5", holds=True),
            LimitRow(limit="flash<=4096B", machine="stm32f4", value=6000, bound=4096, found="5.9 KB", holds=False),
        ],
        left_out=["a step"],
        warnings=["a warning"],
    )  # fmt: skip


@pytest.fixture
def bare_report(full_report: Report) -> Report:
    """What a run without data reports."""
    return full_report.model_copy(
        update={
            "robust_accuracy": None, "threat": None, "data": None, "rows": [], "sweep": [], "amplification": None,
            "transfers": None, "masking": [], "gates": [],
            "limits": [],
            "activations": [], "warnings": [], "left_out": [],
            "kernels": KernelFacts(integer=0, floating=2, counts={}),
            "search": full_report.search.model_copy(
                update={"evaluated": [], "measured": [], "factor": 1.0, "notes": [], "relaxed": []}
            ),
        }
    )  # fmt: skip
