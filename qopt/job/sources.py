"""The network as C, beside the ONNX file."""

from __future__ import annotations

import re
from typing import Any

import torch

from qopt.emit.c import emit_c
from qopt.errors import UsageError
from qopt.job.run import Run
from qopt.measure.network import TwinClassifier, predictions
from qopt.quantize import Applied, AppliedWeights

FORMS = ("onnx", "c")
"""What `--emit` takes; the ONNX file is what is measured and attacked, and always comes."""

CHECKED = 16
"""Report images on which the program's classes are compared with the file's."""


def check_forms(forms: tuple[str, ...], has_data: bool) -> None:
    """Refuse unknown words, and C without images to quantize activations on; raises UsageError."""
    for form in forms:
        if form not in FORMS:
            raise UsageError("unknown word", where="--emit", expected=", ".join(FORMS), got=repr(form))
    if "c" in forms and not has_data:
        raise UsageError("C code computes in integers, and activations are quantized on images", where="--emit c",
            fix="give --data")  # fmt: skip


def c_sources(run: Run, applied: AppliedWeights) -> tuple[dict[str, str], dict[str, Any]]:
    """File name to text, and the facts for the manifest: memory, and whether it sees what the quantized twin sees.

    Raises:
        UnsupportedModelError: an operator without C code, or a tensor that the plan leaves in float.
    """
    assert run.data is not None
    assert isinstance(applied, Applied)
    program = emit_c(run.prepared, applied.quantized, name=c_name(run.name))
    images = run.data.report.images[:CHECKED]
    codes = program.quantize(run.normalisation(torch.from_numpy(images)).numpy())
    found = [int(program.run(image).argmax()) for image in codes]
    twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
    expected = predictions(twin, torch.from_numpy(images)).tolist()
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    files = {
        f"{program.name}.h": program.header, f"{program.name}.c": program.source,
        f"{program.name}_test.c": program.self_test,
    }  # fmt: skip
    facts = {
        "name": program.name, "arena_bytes": program.arena_bytes, "flash_bytes": program.flash_bytes,
        "macs": program.macs, "images": len(images), "same_class": same,
    }  # fmt: skip
    return files, facts


def c_name(name: str) -> str:
    """A C identifier in lower case from a model's name: at most 31 characters, first a letter."""
    word = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return (word if word[:1].isalpha() else f"net_{word}".rstrip("_"))[:31]
