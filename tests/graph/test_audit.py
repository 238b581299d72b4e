"""Doctored torch.export archives: every one is refused, none runs its payload; honest ones come through unchanged."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from qopt.errors import CorruptModelError, ModelError, UnsafeModelError
from qopt.graph.audit import audit_archive
from qopt.graph.load import load_model
from qopt.graph.to_onnx import quiet

Members = dict[str, bytes]
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
ROOT = "archive"


class Small(nn.Module):
    """A convolution, batch norm, a reshape that keeps shape expressions, a linear layer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv(x))).reshape(4 * x.shape[0], 8)
        logits: torch.Tensor = self.fc(y)[: x.shape[0]] + torch.tensor([1.0, 2.0, 3.0])
        return logits


@functools.cache
def honest() -> bytes:
    torch.manual_seed(0)
    program = torch.export.export(
        Small().eval(), (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: Dim("batch")},)
    )  # fmt: skip
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def members(blob: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def pack(content: Members, *, root: str = ROOT, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


def edited(member: str, change: Callable[[Any], None]) -> bytes:
    """The honest archive with one JSON member changed in place by ``change``."""
    content = members(honest())
    document = json.loads(content[member])
    change(document)
    content[member] = json.dumps(document).encode()
    return pack(content)


def with_members(**changes: bytes) -> bytes:
    return pack({**members(honest()), **changes})


def without(name: str) -> bytes:
    return pack({key: data for key, data in members(honest()).items() if key != name})


class Touch:
    """Unpickling an instance creates the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(((Touch(marker),), {}), buffer)
    return buffer.getvalue()


def code(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def nodes(document: Any) -> Any:
    return document["graph_module"]["graph"]["nodes"]


def set_at(member: str, *place: str | int) -> Callable[[Any], bytes]:
    """A function of a value: the honest archive with that value at ``place`` of a JSON member."""

    def craft(value: Any) -> bytes:
        def change(document: Any) -> None:
            for key in place[:-1]:
                document = document[key]
            document[place[-1]] = value

        return edited(member, change)

    return craft


GRAPH = (MODEL, "graph_module", "graph")
TARGET = set_at(*GRAPH, "nodes", 0, "target")
SIGNATURE = (MODEL, "graph_module", "module_call_graph", 0, "signature")
SHAPE = set_at(*GRAPH, "tensor_values", "x", "sizes", 0, "as_expr", "expr_str")
WEIGHT = (WEIGHTS, "config", "fc.weight")


def hostile_placeholder(marker: Path) -> bytes:
    evil = f"x, y={code(marker)}"
    blob = members(honest())
    blob[MODEL] = blob[MODEL].replace(b'{"name": "x"}', json.dumps({"name": evil}).encode())
    return pack(blob)


def opaque_object(marker: Path) -> bytes:
    content = members(honest())
    config = json.loads(content[CONSTANTS])
    config["config"]["evil"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    content[CONSTANTS] = json.dumps(config).encode()
    content["data/constants/opaque_obj_0"] = pickle.dumps(Touch(marker))
    return pack(content)


def pickled_weight(marker: Path) -> bytes:
    content = members(honest())
    config = json.loads(content[WEIGHTS])
    entry = config["config"]["fc.weight"]
    entry["use_pickle"] = True
    content[WEIGHTS] = json.dumps(config).encode()
    content["data/weights/" + entry["path_name"]] = pickled(marker)
    return pack(content)


def duplicated(name: str, copy: str) -> bytes:
    content = members(honest())
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(buffer, "w") as archive:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        for member, data in [*content.items(), (copy, content[name])]:
            archive.writestr(f"{ROOT}/{member}", data)
    return buffer.getvalue()


def tree(kind: str, context: str) -> str:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def bomb() -> bytes:
    return pack({**members(honest()), "extra/bomb": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """A central directory that claims more bytes than the file has."""
    content = members(honest())
    blob = bytearray(pack(content))
    last = blob.rfind(b"PK\x01\x02")
    blob[last + 20 : last + 28] = (10**6).to_bytes(4, "little") * 2
    return bytes(blob)


DEFAULTDICT = '{"default_factory_module": "antigravity", "default_factory_name": "a", "dict_context": []}'

# name -> (archive from a marker path, words of the message)
HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "sample inputs pickle": (lambda m: with_members(**{SAMPLES: pickled(m)}), "plain tensors"),
    "sample inputs bare pickle": (lambda m: with_members(**{SAMPLES: pickle.dumps(Touch(m))}), "sample inputs"),
    "pickled weight": (pickled_weight, "use_pickle: refused: pickled payloads"),
    "opaque object": (opaque_object, "opaque_obj_0: refused: it is a pickle"),
    "legacy weights": (lambda m: with_members(**{"data/weights/model.pt": pickled(m)}), "older layout"),
    "legacy constants": (lambda m: with_members(**{"data/constants/model.pt": pickled(m)}), "older layout"),
    "custom object": (lambda m: with_members(**{"data/constants/custom_obj_0": pickled(m)}), "it is a pickle"),
    "aotinductor library": (lambda m: with_members(**{"data/aotinductor/model/a.so": b"\x7fELF"}), "compiled code"),
    "old layout": (lambda m: with_members(**{"serialized_exported_program.json": b"{}"}), "torch 2.7"),
    "second model": (lambda m: with_members(**{"models/other.json": b"{}"}), "not on the list"),
    "xl weights": (lambda m: with_members(**{"xl_model_weights/model_param_config": b"{}"}), "not on the list"),
    "shape code": (lambda m: SHAPE(code(m)), "expr_str: refused: a shape expression"),
    "shape power tower": (lambda m: SHAPE("Pow(Integer(10), Pow(Integer(10), Integer(10)))"), "a power"),
    "shadowing symbol": (lambda m: SHAPE("Symbol('Add', positive=True)"), "Symbol"),
    "guard code": (lambda m: set_at(MODEL, "guards_code")([code(m)]), "guards_code[0]: refused: a guard"),
    "guard injection": (lambda m: set_at(MODEL, "guards_code")([f"True); {code(m)}; (1"]), "a guard"),
    "placeholder name": (hostile_placeholder, "a name must be a plain identifier"),
    "node name": (lambda m: set_at(*GRAPH, "nodes", 0, "name")(f"a; {code(m)}; b"), "plain identifier"),
    "argument name": (lambda m: set_at(*GRAPH, "nodes", 0, "inputs", 0, "name")("a'b"), "argument name"),
    "string argument": (
        lambda m: set_at(*GRAPH, "nodes", 0, "inputs", 0, "arg")({"as_string": f"'+{code(m)}+'"}), "plain words",
    ),
    "operator argument": (
        lambda m: set_at(*GRAPH, "nodes", 0, "inputs", 0, "arg")({"as_operator": "torch.load"}), "must not be an arg",
    ),
    "object argument": (
        lambda m: set_at(*GRAPH, "nodes", 0, "inputs", 0, "arg")({"as_custom_obj": {"name": "a", "class_fqn": "b"}}),
        "custom objects",
    ),
    "forward argument": (lambda m: set_at(*SIGNATURE, "forward_arg_names")(["x=1"]), "plain identifier"),
    "parameter name": (
        lambda m: set_at(MODEL, "graph_module", "signature", "input_specs", 0, "parameter", "parameter_name")('a"].x'),
        "qualified name",
    ),
    "defaultdict": (
        lambda m: set_at(*SIGNATURE, "in_spec")(tree("collections.defaultdict", DEFAULTDICT)),
        "tuples, lists or dicts",
    ),
    "tree no JSON": (lambda m: set_at(*SIGNATURE, "out_spec")("[" * 100_000), "must be JSON"),
    "from_file": (lambda m: TARGET("torch.ops.aten.from_file.default"), "nodes[0].target: refused: the operator"),
    "save": (lambda m: TARGET("torch.ops.aten.save.default"), "the operator"),
    "torch.load": (lambda m: TARGET("torch.load"), "the operator"),
    "higher order": (lambda m: TARGET("torch.ops.higher_order.triton_kernel_wrapper_functional"), "the operator"),
    "unknown verifier": (lambda m: set_at(MODEL, "verifiers")(["os"]), "verifier"),
    "cuda": (lambda m: set_at(*GRAPH, "tensor_values", "x", "device", "type")("cuda"), "on the CPU"),
    "sparse layout": (lambda m: set_at(*GRAPH, "tensor_values", "x", "layout")(1), "strided"),
    "weight path": (lambda m: set_at(*WEIGHT, "path_name")("../../etc/passwd"), "qualified name"),
    "negative offset": (lambda m: set_at(*WEIGHT, "tensor_meta", "storage_offset")({"as_int": -4}), "not negative"),
    "offset overflow": (lambda m: set_at(*WEIGHT, "tensor_meta", "storage_offset")({"as_int": 1}), "must fit the 96"),
    "shape overflow": (
        lambda m: set_at(*WEIGHT, "tensor_meta", "sizes")([{"as_int": 3}, {"as_int": 9}]), "must fit the 96 bytes",
    ),
    "stride overflow": (
        lambda m: set_at(*WEIGHT, "tensor_meta", "strides")([{"as_int": 2**62}, {"as_int": 1}]), "must fit the 96",
    ),
    "repeated data": (
        lambda m: edited(WEIGHTS, lambda d: d["config"]["fc.weight"]["tensor_meta"].update(
            sizes=[{"as_int": 2**40}, {"as_int": 1}], strides=[{"as_int": 0}, {"as_int": 1}])), "out of proportion",
    ),
    "symbolic weight": (
        lambda m: set_at(*WEIGHT, "tensor_meta", "sizes", 0)({"as_expr": {"expr_str": "Integer(3)", "hint": None}}),
        "not negative",
    ),
    "two types for one payload": (
        lambda m: edited(WEIGHTS, lambda d: d["config"].update(twin={
            **d["config"]["fc.weight"], "tensor_meta": {**d["config"]["fc.weight"]["tensor_meta"], "dtype": 8}})),
        "share a type",
    ),
    "deflated member": (lambda m: bomb(), "members must be stored"),
    "deflated sample inputs": (
        lambda m: with_members(**{SAMPLES: pack({"data.pkl": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)}),
        "members must be stored",
    ),
    "claimed size": (lambda m: overlapping(), "more bytes than the file has"),
    "duplicate member": (lambda m: duplicated(MODEL, MODEL), "two members have this name"),
    "casefold duplicate": (lambda m: duplicated("byteorder", "BYTEORDER"), "not on the list"),
    "dot dot": (lambda m: with_members(**{"../evil": b""}), "not on the list"),
    "dot dot root": (lambda m: pack(members(honest()), root=".."), "not on the list"),
    "backslash": (lambda m: with_members(**{"extra\\evil": b""}), "not on the list"),
    "absolute": (lambda m: pack(members(honest()), root=""), "not on the list"),
}  # fmt: skip


NOT_EVEN_AN_ARCHIVE = {"sample inputs bare pickle"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_and_never_run(name: str, tmp_path: Path) -> None:
    craft, words = HOSTILE[name]
    marker, path = tmp_path / "marker", tmp_path / "model.bin"
    path.write_bytes(craft(marker))
    with pytest.raises((UnsafeModelError, CorruptModelError)) as caught:
        load_model(path)
    text = str(caught.value)
    assert isinstance(caught.value, UnsafeModelError) or name in NOT_EVEN_AN_ARCHIVE
    assert words in text
    assert str(path) in text
    assert "\n" not in text
    assert caught.value.exit_code == 3
    assert not marker.exists()
    assert "antigravity" not in sys.modules


# Evidence that the payloads above are live: torch runs them when nobody audits. The day torch refuses them too, this
# table shrinks.
LIVE = ["sample inputs pickle", "pickled weight", "opaque object", "shape code"]


@pytest.mark.parametrize("name", LIVE)
def test_the_payloads_work_without_the_audit(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    blob = HOSTILE[name][0](marker)
    with quiet(), contextlib.suppress(Exception):  # torch runs the payload, then stumbles over what it returned
        torch.export.load(io.BytesIO(blob))
    assert marker.exists()


def test_trust_skips_the_audit(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt2"
    path.write_bytes(HOSTILE["sample inputs pickle"][0](marker))
    with pytest.raises(UnsafeModelError):
        load_model(path)
    model = load_model(path, trust=True)
    assert marker.exists()
    assert [value.name for value in model.graph.outputs] == ["logits"]


CORRUPT: dict[str, tuple[Callable[[], bytes], str]] = {
    "no sample inputs": (lambda: without(SAMPLES), "lacks data/sample"),
    "no program": (lambda: without(MODEL), "holds no model"),
    "no weight data": (lambda: without("data/weights/weight_0"), "is missing"),
    "wrong format": (lambda: with_members(archive_format=b"pt3"), "archive format"),
    "wrong version": (lambda: with_members(archive_version=b"9"), "archive format"),
    "big endian": (lambda: with_members(byteorder=b"big"), "big-endian"),
    "not JSON": (lambda: with_members(**{MODEL: b"{"}), "not valid JSON"),
    "not UTF-8": (lambda: with_members(**{MODEL: b"\xff\xfe\x00"}), "not valid JSON"),
    "deep JSON": (lambda: with_members(**{MODEL: b"[" * 10**6}), "not valid JSON"),
    "wrong root type": (lambda: with_members(**{MODEL: b"[]"}), "is no object"),
    "string for a number": (lambda: set_at(MODEL, "schema_version", "major")("8"), "is no int"),
    "huge number": (lambda: set_at(MODEL, "schema_version", "major")(2**80), "is no int"),
    "bool for a number": (lambda: set_at(MODEL, "schema_version", "major")(True), "is no int"),
    "unknown union": (lambda: set_at(*GRAPH, "nodes", 0, "inputs", 0, "arg")({"as_code": 1}), "is no Argument"),
    "unknown dtype": (lambda: set_at(*GRAPH, "tensor_values", "x", "dtype")(99), "is no ScalarType"),
    "missing field": (lambda: edited(MODEL, lambda d: d["graph_module"].pop("signature")), "lacks 'signature'"),
    "no tensor meta": (lambda: set_at(*WEIGHT, "tensor_meta")(None), "has no tensor_meta"),
    "cut sample inputs": (
        lambda: with_members(**{SAMPLES: members(honest())[SAMPLES][:200]}), "sample inputs are damaged",
    ),
    "newer schema": (lambda: set_at(MODEL, "schema_version", "major")(99), "torch cannot read"),
    "dangling use": (
        lambda: set_at(*GRAPH, "nodes", 0, "inputs", 0, "arg")({"as_tensor": {"name": "ghost"}}), "torch cannot read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPT)
def test_broken_archives_are_corrupt(name: str, tmp_path: Path) -> None:
    craft, words = CORRUPT[name]
    path = tmp_path / "model.pt"
    path.write_bytes(craft())
    with pytest.raises(CorruptModelError) as caught:
        load_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_is_dropped_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def change(document: Any) -> None:
        for node in nodes(document):
            node["metadata"] = {
                "nn_module_stack": f"a,{code(marker)},b\n", "source_fn_stack": "a,torch.load", "custom": "{}",
                "stack_trace": "/home/someone/secret.py", "from_node": "[]",
            }  # fmt: skip
        document["graph_module"]["metadata"] = {"custom": "{}"}
        document["unknown_field"] = code(marker)

    rebuilt = members(audit_archive(edited(MODEL, change), "x"))
    document = json.loads(rebuilt[MODEL])
    assert all(node["metadata"] == {} for node in nodes(document))
    assert document["graph_module"]["metadata"] == {}
    assert "unknown_field" not in document
    assert b"secret" not in rebuilt[MODEL]
    assert not marker.exists()


def test_rebuilding_drops_extra_files_and_unnamed_payloads() -> None:
    blob = with_members(**{"extra/notes.txt": b"hello", "data/weights/weight_99": b"1234"})
    rebuilt = members(audit_archive(blob, "x"))
    assert "extra/notes.txt" not in rebuilt
    assert "data/weights/weight_99" not in rebuilt
    assert rebuilt.keys() - {".data/version", ".data/serialization_id"} <= members(honest()).keys()


def test_a_root_of_another_name_and_empty_sample_inputs_pass(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(pack({**members(honest()), SAMPLES: b""}, root="сеть"))
    assert [value.name for value in load_model(path).graph.inputs] == ["x"]


def test_every_error_of_the_audit_is_a_model_error() -> None:
    for blob in (b"", b"PK\x05\x06" + bytes(18), b"PK\x03\x04", honest()[:-30]):
        with pytest.raises(ModelError):
            audit_archive(blob, "x")
