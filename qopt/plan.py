"""The plan: which format every weight and activation gets. Search writes it, people edit it, `quantize` applies it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qopt.errors import PlanError, nearest
from qopt.spec import FLOAT, FLOAT_ACTIVATION, ActivationSpec, WeightSpec

SCHEMA: Literal[1] = 1
"""The version of the file format; a reader refuses any other."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@final
class Defaults(_Strict):
    """The formats of whatever ``weights`` and ``activations`` do not name."""

    weights: str = "float"
    activations: str = "float"

    @field_validator("weights")
    @classmethod
    def _weight(cls, value: str) -> str:
        return str(WeightSpec.parse(value))

    @field_validator("activations")
    @classmethod
    def _activation(cls, value: str) -> str:
        return str(ActivationSpec.parse(value))


@final
class Plan(_Strict):
    """One quantization of one network, as `plan.json` holds it.

    Attributes:
        schema_: the format version (key ``schema``).
        defaults: formats of what is not named below.
        weights: layer name or glob to weight spec; a later entry overrides an earlier one.
        activations: tensor name or glob to activation spec.
        ranges: tensor name to the calibrated ``(low, high)``; tensors without one are calibrated from data.
        ties: groups of layers that must share one format.
        rounding: how weights become codes.
        bias_correction: whether the biases absorb the mean shift that quantized weights cause.
        model: SHA-256 of the prepared graph the plan was made for, or empty for a plan that fits any.
        data: SHA-256 of the images that calibrated it, or empty.
        reasons: layer name to why it got its format.
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    defaults: Defaults = Defaults()
    weights: dict[str, str] = {}
    activations: dict[str, str] = {}
    ranges: dict[str, tuple[Finite, Finite]] = {}
    ties: list[list[str]] = []
    rounding: Literal["nearest"] = "nearest"
    bias_correction: bool = False
    model: str = ""
    data: str = ""
    reasons: dict[str, str] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: str(WeightSpec.parse(spec)) for name, spec in value.items()}

    @field_validator("activations")
    @classmethod
    def _activations(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: str(ActivationSpec.parse(spec)) for name, spec in value.items()}

    @field_validator("ranges")
    @classmethod
    def _ranges(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in value.items():
            if low > high:
                raise PlanError("an activation range is upside down", where=name, got=f"[{low}, {high}]")
        return value

    def weight_specs(self, layers: Iterable[str]) -> dict[str, WeightSpec]:
        """The spec of every layer in ``layers``, in their order; raises PlanError for a name that matches none."""
        names = list(layers)
        resolved = _resolve(self.weights, self.defaults.weights, names, "layer")
        specs = {name: WeightSpec.parse(text) for name, text in resolved.items()}
        for group in self.ties:
            _check_tie(group, specs)
        return specs

    def activation_specs(self, tensors: Iterable[str]) -> dict[str, ActivationSpec]:
        """The spec of every quantizable tensor in ``tensors``; raises PlanError for a name that matches none."""
        resolved = _resolve(self.activations, self.defaults.activations, list(tensors), "tensor")
        return {name: ActivationSpec.parse(text) for name, text in resolved.items()}

    def to_json(self) -> str:
        """The file's text: two-space JSON in the order of the fields, ending in a newline."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """Parse a plan; raises PlanError naming ``where`` and the first thing wrong."""
        try:
            return Plan.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError("not valid JSON", where=where, got=str(error)) from error
        except ValidationError as error:
            raise PlanError(*_first_problem(error), where=where) from error

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan does (its reasons do not count): equal plans quantize alike."""
        body = self.model_dump(by_alias=True, exclude={"reasons"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def with_changes(self, **changes: Any) -> Plan:
        """A copy with some fields replaced, validated like a plan that is read."""
        return Plan.model_validate({**self.model_dump(by_alias=True), **changes})


def uniform(weights: WeightSpec = FLOAT, activations: ActivationSpec = FLOAT_ACTIVATION, **fields: Any) -> Plan:
    """A plan that gives every layer one format and every quantizable tensor another."""
    return Plan(defaults=Defaults(weights=str(weights), activations=str(activations)), **fields)


def _resolve(entries: Mapping[str, str], default: str, names: list[str], what: str) -> dict[str, str]:
    known = set(names)
    chosen = dict.fromkeys(names, default)
    for pattern, spec in entries.items():
        matched = [pattern] if pattern in known else fnmatch.filter(names, pattern)
        if not matched:
            raise PlanError(
                f"the plan names a {what} that the model does not have", where=pattern, fix=nearest(pattern, known)
            )
        chosen.update(dict.fromkeys(matched, spec))
    return chosen


def _check_tie(group: list[str], specs: Mapping[str, WeightSpec]) -> None:
    for name in group:
        if name not in specs:
            raise PlanError(
                "a tie group names a layer that the model does not have", where=name, fix=nearest(name, specs)
            )
    if len({specs[name] for name in group}) > 1:
        listed = ", ".join(f"{name} {specs[name]}" for name in group)
        raise PlanError("tied layers must share one format", got=listed, fix="give them the same spec")


def _first_problem(error: ValidationError) -> tuple[str]:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    known = nearest(str(first["loc"][-1]), Plan.model_fields) if first["type"] == "extra_forbidden" else ""
    return (f"key {place!r}: {first['msg'].lower()}" + (f"; {known}" if known else ""),)
