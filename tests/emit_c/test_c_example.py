"""The embedded example on its own images: against the reference, code for code, and against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qopt.emit import emit
from qopt.emit.c import emit_c
from qopt.graph.load import load_model
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.plan import uniform
from qopt.quantize import Quantizer
from qopt.runtime.session import Runner, to_bytes
from qopt.spec import ActivationSpec, WeightSpec

ARENA, FLASH = 384 * 1024, 2 * 1024 * 1024


def split(examples: Path, part: str) -> NDArray[np.float32]:
    with np.load(examples / "fashion.npz") as data:
        return np.asarray(data[f"x_{part}"].reshape(-1, 1, 28, 28) / 255, np.float32)


@pytest.fixture(scope="module")
def example(examples: Path) -> Prepared:
    return prepare(load_model(examples / "fashion_resnet.pt"))


@pytest.fixture(scope="module")
def quantizer(example: Prepared, examples: Path) -> Quantizer:
    return Quantizer(example, torch.from_numpy(split(examples, "train")[:256]))


def compare(spec: str, count: int, quantizer: Quantizer, examples: Path, compiled: Any, reference: Any) -> None:
    """No code of the reference missed, at least 99 % of ONNX Runtime's classes, within the memory of a controller."""
    prepared, (weights, activations) = quantizer.prepared, spec.split("@")
    quantized = quantizer.apply(uniform(WeightSpec.parse(weights), ActivationSpec.parse(activations))).quantized
    program = emit_c(prepared, quantized, name="net")
    pixels = split(examples, "test")[:count]
    codes = quantized.activations[prepared.input].quantize(torch.from_numpy(pixels)).numpy()
    runner = compiled(program)
    found = runner(codes)
    oracle = reference(prepared, quantized, program.network.output.code.scale)
    expected = np.concatenate([oracle.logits(batch) for batch in np.array_split(codes.astype(np.int64), count // 50)])
    agreement = (found.argmax(1) == Runner(to_bytes(emit(prepared, quantized)))(pixels).argmax(1)).mean()
    print(
        f"{spec}: {count} images, {(found != expected).sum()} codes differ, ONNX Runtime agrees on {agreement:.2%}, "
        f"arena {program.arena_bytes}, flash {program.flash_bytes}, {program.macs} multiply-accumulates"
    )
    assert np.array_equal(found, expected)
    assert agreement >= 0.99
    assert program.arena_bytes <= ARENA
    assert program.flash_bytes <= FLASH
    assert program.arena_bytes == program.memory.least_bytes
    assert runner.self_test().returncode == 0


@pytest.mark.parametrize("spec", ["int8@int8", "int4@int8"])
def test_the_example(spec: str, quantizer: Quantizer, examples: Path, compiled: Any, reference: Any) -> None:
    compare(spec, 200, quantizer, examples, compiled, reference)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["int8@int8", "int4@int8", "log4@int8", "int3@int5"])
def test_the_example_in_full(spec: str, quantizer: Quantizer, examples: Path, compiled: Any, reference: Any) -> None:
    compare(spec, 2000, quantizer, examples, compiled, reference)


@pytest.mark.assets
@pytest.mark.parametrize(("name", "data"), [("resnet20_cifar10_std", "cifar10"), ("cnn_fashion_kw", "fashion")])
def test_public_networks(name: str, data: str, assets: Path, compiled: Any, reference: Any) -> None:
    compare_public(name, data, 40, 4, assets, compiled, reference)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "data"),
    [("resnet20_cifar10_std", "cifar10"), ("cnn_fashion_kw", "fashion"), ("cnn_mnist_madrytiny", "mnist")],
)
def test_public_networks_in_full(name: str, data: str, assets: Path, compiled: Any, reference: Any) -> None:
    compare_public(name, data, 2000, 2000, assets, compiled, reference)


def compare_public(
    name: str, data: str, count: int, compared: int, assets: Path, compiled: Any, reference: Any
) -> None:
    """One has its normalisation in front, and shortcuts that cut and pad; ``compared`` of the images code for code."""
    prepared = prepare(load_model(assets / "onnx" / f"{name}.onnx"))
    with np.load(assets / "data" / f"{data}_small.npz") as file:
        train, test = (np.asarray(file[f"x_{part}"][:count] / 255, np.float32) for part in ("train", "test"))
    shape = (-1, *prepared.input_shape)
    calibrated = Quantizer(prepared, torch.from_numpy(train[:256].reshape(shape)))
    quantized = calibrated.apply(uniform(WeightSpec.parse("int4"), ActivationSpec.parse("int8"))).quantized
    program = emit_c(prepared, quantized, name="net")
    pixels = test.reshape(shape)
    for step in program.network.normalisation:
        apply = {"-": np.subtract, "+": np.add, "*": np.multiply, "/": np.divide}[step.sign]
        pixels = apply(pixels, np.array(step.numbers, np.float32).reshape(-1, 1, 1))
    start = program.network.input.name
    codes = quantized.activations[start].quantize(torch.from_numpy(pixels)).numpy()
    found = compiled(program)(codes)
    oracle = reference(prepared, quantized, program.network.output.code.scale)
    batches = np.array_split(codes[:compared].astype(np.int64), max(1, compared // 50))
    expected = np.concatenate([oracle.logits(batch, start) for batch in batches])
    same = found.argmax(1) == Runner(to_bytes(emit(prepared, quantized)))(test.reshape(shape)).argmax(1)
    print(
        f"{name}: {compared} images, {(found[:compared] != expected).sum()} codes differ, ONNX Runtime agrees on "
        f"{same.mean():.2%}, arena {program.arena_bytes}, flash {program.flash_bytes}"
    )
    assert np.array_equal(found[:compared], expected)
    assert same.mean() >= 0.97
    assert program.arena_bytes <= ARENA
