"""The Markdown view, word for word."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from qopt.report.markdown import to_markdown
from qopt.report.model import Drop, Report, Share
from qopt.report.numbers import drop, share

# ruff: noqa: E501
GOLDEN = """\
# net: quantization report

net in 3.50 bits per weight; gates fail: robust_drop<=2.

## Setting

|  |  |
|---|---|
| target | int4: weights int2, int4; activations int8; bits<=4 |
| threat model | linf 8/255, seed 7 |
| images | 50 to calibrate, 50 to select, 100 to report, 80 attacked |
| network | 2 layers, 12,345 weights, input x 1 x 28 x 28 |

- batch norm folded
- a note on data

## Networks

Drops are against float on the same images, in points, with their standard errors.

| network | bits | clean | robust | clean drop | robust drop | masking | note |
|---|---:|---:|---:|---:|---:|---:|---|
| float | 32.00 | 90.0 % (88.0-92.0) | 65.0 % (63.0-67.0) | - | - | not checked |  |
| qopt | 3.50 | 89.0 % (87.0-91.0) | 60.0 % (58.0-62.0) | +1.0 +- 0.5 | +5.0 +- 0.5 | none |  |
| qopt, naive evaluation | 3.50 | 89.0 % (87.0-91.0) | - | -0.2 +- 0.5 | - | masked | not a measurement |

## Gates and limits

### Gates

| gate | found |  |
|---|---|---|
| clean_drop<=2 | 1.00 points, at most 2.00 at 95 % | holds |
| robust_drop<=2 | 5.00 points, at most 6.00 at 95 % | FAILS |

### Limits

| limit | on | found |  |
|---|---|---|---|
| bits<=4 | stored | 3.5 | holds |
| flash<=4096B | stm32f4 | 5.9 KB | BROKEN |

## Attacks

Accuracy under each attack; robust counts an image that no attack fooled.

| network | PGD-20 | transfer | robust |
|---|---:|---:|---:|
| float | 66.0 % (64.0-68.0) | - | 65.0 % (63.0-67.0) |
| qopt | 61.0 % (59.0-63.0) | 70.0 % (68.0-72.0) | 60.0 % (58.0-62.0) |

## Accuracy against the size of the attack

On 100 images, attacked anew at each radius.

| network | 0 | 0.1 |
|---|---:|---:|
| float | 90.0 % (88.0-92.0) | 70.0 % (68.0-72.0) |
| qopt | 90.0 % (88.0-92.0) | 65.0 % (63.0-67.0) |

## Can the attacks be believed?

Rules on gradients that mislead attacks; one that is triggered makes the robust accuracy worthless.

| network | rule | triggered | numbers |
|---|---|---|---|
| qopt | transfer beats white box | TRIGGERED | 70.0 \\| 61.0 |

## Transfers and gradients

Fooled: share of the PGD examples made on the network of the row that the file of the column gets wrong. Images that the former gets wrong from the start are left as they are. Cosine: mean, -1 to 1, between the gradients of two networks' losses on clean images; on the diagonal the share of images with a usable gradient. Both on the same 64 images.

### Fooled, in percent

|  | A | B | C |
|---|---:|---:|---:|
| clean images | 10 | 12 | 11 |
| A float | 35 | 41 | 36 |
| B int4:max@int4 | 21 | 61 | 23 |
| C qopt | 30 | 40 | 38 |

### Cosine between gradients

|  | A | B | C |
|---|---:|---:|---:|
| A float | 1.00 | 0.50 | 0.75 |
| B int4:max@int4 | 0.50 | 0.97 | -0.25 |
| C qopt | 0.75 | -0.25 | 1.00 |

## Size, kernels and speed

|  |  |
|---|---|
| file | 6,000 bytes, 0.120 of float's 50,000 |
| weights | 3.50 code bits and 3.75 stored bits each |
| kernels | 1 integer, 1 float, by ONNX Runtime on this machine |
| file and graph | same class on 99.50 % of images |
| fresh process | the file's outputs are within 1e-03 of the quantized graph's |

## Error amplification

How far a layer's output is from what it should be, as a share of its size: the mean of \\|\\|A - A'\\|\\| / \\|\\|A\\|\\| over 64 images. Error: A is float's, A' that of the quantized network on the same image. Attack: A is of a clean image, A' of the adversarial one made from it on float; both networks look at the same. Where qopt is above float, quantization amplifies the attack.

| layer | no. | attack, float | attack, qopt | error, clean | error, attacked |
|---|---:|---:|---:|---:|---:|
| conv\\|1 | 1 | 0.125 | 0.13 | 0.0525 | 0.06 |
| fc | 2 | 0.25 | 0.312 | 0.0775 | - |

## Layers

| layer | op | shape | format | bits | \\|\\|W\\|\\| | \\|\\|W_q\\|\\| | \\|\\|dW\\|\\| | MACs | integer | pair sum | why |
|---|---|---|---|---:|---:|---:|---:|---:|---|---:|---|
| conv\\|1 | Conv | 16x1x3x3 | int4:max | 4 | 1.23 | 1.2 | 0.0345 | 112,896 | yes | 7140 | sensitivity 0.01 |
| fc | Gemm | 10x64 | float | 32 | 2 | 2 | 0 | 640 | no | - |  |

## How the plan was found

Strategy greedy on KL divergence; thresholds: weighted <= 0.25. All thresholds were relaxed by 1.5, because of conv\\|1, fc.

| plan | bits | KL clean | KL adversarial | clean drop | robust drop |  |
|---|---:|---:|---:|---:|---:|---|
| greedy | 3.50 | 0.01235 | 0.1 | +0.2 | -0.4 | chosen |
| greedy, bias correction | 3.50 | 0.02 | - | - | - |  |

- a note on the search

## Activations

| tensor | format | low | high | scale | zero |
|---|---:|---:|---:|---:|---:|
| x | int8 | 0 | 1 | 0.003922 | 0 |

## Left out

- a step

## Warnings

- a warning

## Reproduce

    qopt optimize net --target int4 --robust --data ... --seed 7
"""

BARE = """\
# net: quantization report

net in 3.50 bits per weight; gates fail: robust_drop<=2.

## Setting

|  |  |
|---|---|
| target | int4: weights int2, int4; activations int8; bits<=4 |
| network | 2 layers, 12,345 weights, input x 1 x 28 x 28 |

- batch norm folded

## Size, kernels and speed

|  |  |
|---|---|
| file | 6,000 bytes, 0.120 of float's 50,000 |
| weights | 3.50 code bits and 3.75 stored bits each |
| kernels | 0 integer, 2 float, by ONNX Runtime on this machine |

## Layers

| layer | op | shape | format | bits | \\|\\|W\\|\\| | \\|\\|W_q\\|\\| | \\|\\|dW\\|\\| | MACs | integer | pair sum | why |
|---|---|---|---|---:|---:|---:|---:|---:|---|---:|---|
| conv\\|1 | Conv | 16x1x3x3 | int4:max | 4 | 1.23 | 1.2 | 0.0345 | 112,896 | yes | 7140 | sensitivity 0.01 |
| fc | Gemm | 10x64 | float | 32 | 2 | 2 | 0 | 640 | no | - |  |

## How the plan was found

Strategy greedy on KL divergence; thresholds: weighted <= 0.25.

## Reproduce

    qopt optimize net --target int4 --robust --data ... --seed 7
"""


def test_the_full_report(full_report: Report) -> None:
    assert to_markdown(full_report) == GOLDEN


def test_a_report_without_data(bare_report: Report) -> None:
    assert to_markdown(bare_report) == BARE


def test_the_view_of_a_report_that_was_read_is_the_same(full_report: Report) -> None:
    assert to_markdown(Report.from_json(full_report.to_json())) == to_markdown(full_report)


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def check_tables(text: str) -> None:
    """Every table line has as many cells as the line before it."""
    lines = text.splitlines()
    for above, below in pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert cells(above) == cells(below), below


NAMES = ["plain", "a|b", "||W||", "two\nlines", "tab\there", "", "\\|", "`code` | **bold**"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_a_table(full_report: Report, name: str) -> None:
    layer = full_report.layers[0].model_copy(update={"name": name, "reason": name})
    row = full_report.rows[0].model_copy(update={"name": name, "attacked": {name: full_report.rows[0].clean}})
    activation = full_report.activations[0].model_copy(update={"tensor": name})
    report = full_report.model_copy(update={"layers": [layer], "rows": [row], "activations": [activation]})
    check_tables(to_markdown(report))


def test_the_table_check_is_sharp() -> None:
    with pytest.raises(AssertionError):
        check_tables("| a | b |\n|---|---|\n| a|b | c |")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (Share(value=87.34, low=85.06, high=89.25, n=10), "87.3 % (85.1-89.2)"),
        (Share(value=0.0, low=0.0, high=3.7, n=10), "0.0 % (0.0-3.7)"),
    ],
)
def test_shares(value: Share | None, text: str) -> None:
    assert share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (Drop(value=1.25, standard_error=0.41, low=0, high=2, n=10), "+1.2 +- 0.4"),
        (Drop(value=-3.0, standard_error=0.0, low=-3, high=-3, n=10), "-3.0 +- 0.0"),
        (Drop(value=0.0, standard_error=0.0, low=0, high=0, n=10), "+0.0 +- 0.0"),
    ],
)
def test_drops(value: Drop | None, text: str) -> None:
    assert drop(value) == text
