"""The plan: which format every weight and activation gets. Search writes it, people edit it, `quantize` applies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import Field, ValidationError, WithJsonSchema, field_validator

from qopt.documents import Document, first_problem, read
from qopt.errors import PlanError, UsageError, nearest
from qopt.spec import FLOAT, FLOAT_ACTIVATION, WEIGHT_PATTERN, ActivationSpec, WeightSpec

SCHEMA: Literal[1] = 1
"""The version of the file format; a reader refuses any other."""

_ACTIVATION = r"^(float|int[1-8](:(minmax|mse|entropy|clip[16]|p100|p[5-9][0-9](\.[0-9]+)?))?)$"
WeightText = Annotated[str, WithJsonSchema({"type": "string", "pattern": WEIGHT_PATTERN})]
ActivationText = Annotated[str, WithJsonSchema({"type": "string", "pattern": _ACTIVATION})]


@final
class Defaults(Document):
    """The formats of whatever ``weights`` and ``activations`` do not name."""

    weights: WeightText = "float"
    activations: ActivationText = "float"

    @field_validator("weights")
    @classmethod
    def _weight(cls, value: str) -> str:
        return _canonical(WeightSpec.parse, value, "key 'defaults.weights'")

    @field_validator("activations")
    @classmethod
    def _activation(cls, value: str) -> str:
        return _canonical(ActivationSpec.parse, value, "key 'defaults.activations'")


@final
class Plan(Document):
    """One quantization of one network, as `plan.json` holds it.

    Attributes:
        schema_: the format version (key ``schema``, and so the constructor's argument).
        defaults: formats of what is not named below.
        weights: layer name or glob to weight spec; a later entry overrides an earlier one.
        activations: tensor name or glob to activation spec.
        ranges: tensor name to the calibrated ``(low, high)``; tensors without one are calibrated from data.
        ties: groups of layers that must share one format.
        rounding: how weights become codes: each to the nearest level, by GPTQ on the inputs of its layer, or by
            AdaRound, which is trained on the outputs of blocks of layers and starts where GPTQ ends.
        bias_correction: whether the biases absorb the mean shift that quantized weights cause.
        equalisation: whether the ranges of channels are evened out between layers before anything is rounded.
        model: SHA-256 of the prepared and, where asked for, equalised graph that the plan was made for, or empty for a
            plan that fits any.
        data: SHA-256 of the images that calibrated it, or empty.
        reasons: name of a layer, or of a tensor with another format than the default, to why it got its format.
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    defaults: Defaults = Defaults()
    weights: dict[str, WeightText] = Field(default_factory=dict)
    activations: dict[str, ActivationText] = Field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    ties: list[list[str]] = Field(default_factory=list)
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    bias_correction: bool = False
    equalisation: bool = False
    model: str = ""
    data: str = ""
    reasons: dict[str, str] = Field(default_factory=dict)

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: _canonical(WeightSpec.parse, spec, f"key 'weights.{name}'") for name, spec in value.items()}

    @field_validator("activations")
    @classmethod
    def _activations(cls, value: dict[str, str]) -> dict[str, str]:
        parse = ActivationSpec.parse
        return {name: _canonical(parse, spec, f"key 'activations.{name}'") for name, spec in value.items()}

    @field_validator("ranges")
    @classmethod
    def _ranges(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in value.items():
            if low > high:
                raise PlanError("the range is upside down", where=f"key 'ranges.{name}'", got=f"[{low}, {high}]")
        return value

    def weight_specs(self, layers: Iterable[str]) -> dict[str, WeightSpec]:
        """The spec of every layer in ``layers``, in their order.

        Raises:
            PlanError: a name or glob that matches none, or a tie group with unknown layers or different formats.
        """
        names = list(layers)
        resolved = _resolve(self.weights, self.defaults.weights, names, "layer")
        specs = {name: WeightSpec.parse(text) for name, text in resolved.items()}
        for group in self.ties:
            _check_tie(group, specs)
        return specs

    def activation_specs(self, tensors: Iterable[str]) -> dict[str, ActivationSpec]:
        """The spec of every quantizable tensor in ``tensors``, in their order.

        Raises:
            PlanError: a name or glob, or the name of a range, that matches none.
        """
        names = list(tensors)
        resolved = _resolve(self.activations, self.defaults.activations, names, "tensor")
        for name in self.ranges:
            if name not in resolved:
                raise _unknown("tensor", name, names)
        return {name: ActivationSpec.parse(text) for name, text in resolved.items()}

    def to_json(self) -> str:
        """The file's text: two-space JSON in the order of the fields, ending in a newline."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """Parse a plan; raises PlanError naming ``where`` and the first thing wrong."""
        return read(Plan, text, where, PlanError)

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan does (its reasons do not count): equal plans quantize alike."""
        body = self.model_dump(by_alias=True, exclude={"reasons"})
        for ordered in ("weights", "activations"):  # a later glob overrides an earlier one
            body[ordered] = list(body[ordered].items())
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def with_changes(self, **changes: Any) -> Plan:
        """A copy with some fields replaced; raises PlanError where the result is no plan."""
        try:
            return Plan.model_validate({**self.model_dump(by_alias=True), **changes})
        except ValidationError as error:
            raise first_problem(Plan, error, "plan", PlanError) from error


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        UsageError: the file cannot be read.
        PlanError: it holds no plan.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read the plan", where=str(path), got=str(error)) from error


def uniform(weights: WeightSpec = FLOAT, activations: ActivationSpec = FLOAT_ACTIVATION, **fields: Any) -> Plan:
    """A plan that gives every layer one format and every quantizable tensor another."""
    return Plan(defaults=Defaults(weights=str(weights), activations=str(activations)), **fields)


def _canonical(parse: Callable[[str], object], text: str, where: str) -> str:
    try:
        return str(parse(text))
    except PlanError as error:
        raise error.at(where) from error


def _resolve(entries: Mapping[str, str], default: str, names: list[str], what: str) -> dict[str, str]:
    chosen = dict.fromkeys(names, default)
    for pattern, spec in entries.items():
        matched = [pattern] if pattern in chosen else [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise _unknown(what, pattern, names)
        chosen.update(dict.fromkeys(matched, spec))
    return chosen


def _unknown(what: str, name: str, known: Iterable[str]) -> PlanError:
    return PlanError(f"the plan names a {what} that the model does not have", where=name, fix=nearest(name, known))


def _check_tie(group: list[str], specs: Mapping[str, WeightSpec]) -> None:
    for name in group:
        if name not in specs:
            raise _unknown("tied layer", name, specs)
    if len({specs[name] for name in group}) > 1:
        listed = ", ".join(f"{name} {specs[name]}" for name in group)
        raise PlanError("tied layers must share one format", where=group[0], got=listed, fix="give them the same spec")
