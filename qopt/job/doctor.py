"""What qopt makes of a model file before anything is quantized: `qopt doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import onnx_ir as ir
from pydantic import Field

from qopt.cache import Cache
from qopt.columns import columns, section
from qopt.config import Options
from qopt.documents import Document
from qopt.errors import ModelError, QoptError, UsageError
from qopt.graph.facts import kept_in_float
from qopt.graph.formats import identify
from qopt.graph.load import load_model
from qopt.graph.model import NOTES, Prepared
from qopt.graph.prepare import prepare
from qopt.job.optimize import Task, start
from qopt.size import Stored, stored_bytes
from qopt.spec import WeightSpec

ROUGH: tuple[str, ...] = ("int8", "int4")
"""Formats that the size is foretold in, every layer in the same one."""


@final
class TensorFacts(Document):
    """An input or output as the file declares it; sizes are numbers, names of dynamic axes, or ``?``."""

    name: str
    dtype: str
    shape: list[int | str] | None


@final
class LayerDiagnosis(Document):
    """A weight that can be quantized; ``share`` is the part of all float numbers that it holds, in [0, 1]."""

    name: str
    op: str
    shape: list[int]
    weights: int
    share: float


@final
class KeptWeight(Document):
    """A weight of a matrix product, convolution or table that stays in float, and why."""

    name: str
    weights: int
    reason: str


@final
class Diagnosis(Document):
    """What `diagnose` found; whatever could not be found out because of ``reason`` is empty or None.

    Attributes:
        file: as it was named.
        format: the kind of file; empty where it is none that qopt knows.
        exit_code: 0 where it can be compiled, else what `qopt optimize` would end with: 2 for a missing or wrong
            option, 3 for a model that is not supported, 4 where a check of qopt's own fails.
        reason: why it cannot be compiled; empty where it can.
        opset: of the standard operators; of what comes out of a file of torch, its export.
        exporter: what wrote the graph.
        operators: of the graph as loaded, to how often each is there, most often first, constants left out.
        kept: weights that stay in float. All that is no weight (biases, norms, constants) counts as ``others``.
        others: numbers in float that are no weights of layers and not in ``kept``.
        attacked: whether gradients and images can be run through it.
        unattacked: why not.
        batch: what its batch axis is, in a word or two.
        bytes: of the weights and all other constants: ``float``, and roughly in ``int8`` and ``int4``.
        notes: what was done to the graph.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    file: str
    format: str = ""
    exit_code: int = 0
    reason: str = ""
    opset: int | None = None
    exporter: str = ""
    inputs: tuple[TensorFacts, ...] = ()
    outputs: tuple[TensorFacts, ...] = ()
    operators: dict[str, int] = Field(default_factory=dict)
    layers: tuple[LayerDiagnosis, ...] = ()
    kept: tuple[KeptWeight, ...] = ()
    others: int = 0
    attacked: bool = False
    unattacked: str = ""
    batch: str = ""
    bytes: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def compiles(self) -> bool:
        """Whether `qopt optimize` takes it."""
        return self.exit_code == 0

    def to_json(self) -> str:
        """Two-space JSON in the order of the fields, ending in a newline."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def diagnose(
    model: str | Path, *, factory: str | None = None, trust: bool = False, input_shape: tuple[int, ...] | None = None
) -> Diagnosis:
    """Load and prepare a model as `qopt.optimize` does without data, and say what was found or what stood in the way.

    Args:
        model: a model file.
        factory: as `load_model` takes it, like ``trust`` and ``input_shape``.

    Raises:
        UsageError: there is no such file, or it cannot be read. Everything else is part of the diagnosis.
    """
    path, facts = Path(model), dict[str, Any]()
    try:
        facts["format"] = identify(path).value
        loaded = load_model(path, factory=factory, trust=trust, input_shape=input_shape)
        facts |= _graph_facts(loaded)
        facts |= _job_facts(loaded, path.stem)
    except QoptError as error:
        if isinstance(error, UsageError) and "format" not in facts:
            raise
        facts |= {"exit_code": error.exit_code, "reason": str(error)}
    return Diagnosis(file=str(model), **facts)


def _graph_facts(model: ir.Model) -> dict[str, Any]:
    graph = model.graph
    stored = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in graph.all_nodes()
        if node.op_type != "Constant"
    )
    return {
        "opset": model.opset_imports.get(""),
        "exporter": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "inputs": tuple(_tensor(value) for value in graph.inputs if not value.is_initializer()),
        "outputs": tuple(_tensor(value) for value in graph.outputs),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "bytes": {"float": sum(tensor.nbytes for tensor in stored)},
        "notes": tuple(model.meta.get(NOTES, ())),
    }


def _tensor(value: ir.Value) -> TensorFacts:
    sizes = None
    if value.shape is not None:
        sizes = [dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape]
    return TensorFacts(name=value.name or "", dtype=str(value.dtype or value.type or "?"), shape=sizes)


def _job_facts(model: ir.Model, name: str) -> dict[str, Any]:
    """The facts of the prepared graph; where the job refuses the model, with those that there are and why."""
    try:
        run = start(Task(model, name, None, Options()), Cache(None), lambda step: None)
    except ModelError as error:
        try:
            facts = _prepared_facts(prepare(model))
        except QoptError:  # the refusal itself, or a later one of the same graph: the first says why
            facts = {}
        return facts | {"exit_code": error.exit_code, "reason": str(error)}
    facts = _prepared_facts(run.prepared)
    return facts | {"attacked": not run.unattacked, "unattacked": run.unattacked.removeprefix("not attacked: ")}


def _prepared_facts(prepared: Prepared) -> dict[str, Any]:
    numbers = {
        name: value.const_value.size
        for name, value in prepared.model.graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    }
    total = max(sum(numbers.values()), 1)
    reasons = kept_in_float(prepared.model, tables=not prepared.image)
    kept = tuple(KeptWeight(name=name, weights=numbers.get(name, 0), reason=why) for name, why in reasons.items())
    layers = tuple(
        LayerDiagnosis(name=x.name, op=x.op, shape=list(x.shape), weights=x.weights, share=round(x.weights / total, 6))
        for x in prepared.layers
    )
    rest = sum(numbers.values()) - sum(x.weights for x in layers) - sum(x.weights for x in kept)
    return {
        "layers": layers, "kept": kept, "others": rest, "batch": _batch(prepared), "bytes": _sizes(prepared),
        "notes": tuple(note for note in prepared.notes if " stays in float: " not in note),
    }  # fmt: skip


def _batch(prepared: Prepared) -> str:
    if not prepared.image:
        return "as the file declares it"
    return "any size" if prepared.batch is None else f"fixed to {prepared.batch}"


def _sizes(prepared: Prepared) -> dict[str, int]:
    tensors = [v.const_value for v in prepared.model.graph.initializers.values() if v.const_value is not None]
    whole = sum(tensor.nbytes for tensor in tensors)
    rest = whole - sum(4 * layer.weights for layer in prepared.layers)
    found = {"float": whole}
    for text in ROUGH:
        spec = WeightSpec.parse(text)
        packed = stored_bytes(Stored(layer.weights, layer.channels, spec) for layer in prepared.layers)
        found[text] = rest + packed
    return found


def show_diagnosis(found: Diagnosis) -> str:
    """The diagnosis for people, ending in a newline; what is not known is left out."""
    facts = [("file", found.file), ("format", found.format or "none that qopt knows")]
    facts += [("opset", str(found.opset))] if found.opset is not None else []
    facts += [("exporter", found.exporter)] if found.exporter else []
    facts += [("inputs", ", ".join(map(_value, found.inputs)))] if found.inputs else []
    facts += [("outputs", ", ".join(map(_value, found.outputs)))] if found.outputs else []
    facts += [("batch axis", found.batch)] if found.batch else []
    facts += [("size", ", ".join(_size(*item) for item in found.bytes.items()))] if found.bytes else []
    if found.compiles:
        facts.append(("attacks", "yes" if found.attacked else f"no: {found.unattacked}"))
    kept = [(row.name, f"{row.weights:,}", row.reason) for row in found.kept]
    others = [("all else", f"{found.others:,}", "biases, norms and constants")] if found.others else []
    layers = [
        (row.name, row.op, " x ".join(map(str, row.shape)), f"{row.weights:,}", f"{100 * row.share:.1f} %")
        for row in found.layers
    ]
    parts = [
        columns(facts), section("operators", _counts(found.operators)),
        section(f"{len(layers)} layer{'s' * (len(layers) != 1)} that can be quantized", layers, right=(3, 4)),
        section("kept in float", [*kept, *others], right=(1,)), section("notes", [(note,) for note in found.notes]),
        "can be compiled" if found.compiles else f"cannot be compiled: {found.reason}",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _value(value: TensorFacts) -> str:
    return f"{value.name} {value.dtype} " + ("?" if value.shape is None else f"({', '.join(map(str, value.shape))})")


def _size(name: str, size: int) -> str:
    return f"{name} {size:,} bytes" if name == "float" else f"in {name} about {size:,}"


def _counts(operators: Mapping[str, int]) -> list[tuple[str, ...]]:
    return [(name, str(count)) for name, count in operators.items()]
