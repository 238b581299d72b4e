"""The comparison with peers without peers: what a file stores, rows, failures, and the page against the log."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import qopt
from qopt.cache import Cache
from qopt.data import Data, Split
from qopt.plan import Defaults, Plan
from qopt.statistics import paired_difference
from qopt.threat import ThreatModel

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SHAPE = (6, 3, 2, 2)
COUNT = int(np.prod(SHAPE))


@pytest.fixture(scope="module")
def peers() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("attacked", "job", "quantized", "table", "weights")
        parts = {name: importlib.import_module(f"peer_adapters.{name}") for name in names}
        yield SimpleNamespace(main=importlib.import_module("peers"), **parts)


# what a file stores


def convolution(nodes: list[onnx.NodeProto], held: list[TensorProto], weight: str = "w") -> onnx.ModelProto:
    """A file of one convolution of 2 x 2, and a pooling, whose weight the nodes make."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])]
    rest = [
        helper.make_node("Conv", ["x", weight], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph([*nodes, *rest], "g", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def codes(low: int, high: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Numbers of the whole range, both ends there."""
    found = np.random.default_rng(0).integers(low, high + 1, SHAPE)
    found.flat[:2] = low, high
    return found.astype(dtype)


def tensor(name: str, array: np.ndarray[Any, Any] | np.generic) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def four_bits(name: str, array: np.ndarray[Any, Any], kind: int) -> TensorProto:
    return helper.make_tensor(name, kind, array.shape, array.flatten().tolist())


SCALES = np.linspace(0.1, 0.3, 6, dtype=np.float32)
ZEROS = np.zeros(6, np.int8)
UNPACK = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0)
ROUND = helper.make_node("QuantizeLinear", ["f", "s", "z"], ["q"], axis=0)
SCALED = [tensor("s", SCALES), tensor("z", ZEROS)]
PER_CHANNEL = 6 * (4 + 1)


def float_weights() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


def plain() -> onnx.ModelProto:
    return convolution([], [tensor("w", float_weights())])


def int8() -> onnx.ModelProto:
    return convolution([UNPACK], [tensor("q", codes(-127, 127, np.int8)), *SCALED])


def int4_in_bytes() -> onnx.ModelProto:
    return convolution([UNPACK], [tensor("q", codes(-8, 7, np.int8)), *SCALED])


def int4_packed() -> onnx.ModelProto:
    held = [four_bits("q", codes(-8, 7, np.int64), TensorProto.INT4), tensor("s", SCALES)]
    held.append(four_bits("z", np.zeros(6, np.int64), TensorProto.INT4))
    return convolution([UNPACK], held)


def rounded_at_load() -> onnx.ModelProto:
    return convolution(
        [ROUND, UNPACK], [tensor("f", codes(-127, 127, np.float32) * SCALES[:, None, None, None]), *SCALED]
    )


def rounded_and_clipped() -> onnx.ModelProto:
    clip = helper.make_node("Clip", ["q", "low", "high"], ["k"])
    unpack = helper.make_node("DequantizeLinear", ["k", "s", "z"], ["w"], axis=0)
    held = [tensor("f", float_weights() * 100), *SCALED, tensor("low", np.int8(-8)), tensor("high", np.int8(7))]
    return convolution([ROUND, clip, unpack], held)


def stored_codes_clipped() -> onnx.ModelProto:
    clip = helper.make_node("Clip", ["q", "low", "high"], ["k"])
    unpack = helper.make_node("DequantizeLinear", ["k", "s", "z"], ["w"], axis=0)
    held = [tensor("q", codes(-100, 100, np.int8)), *SCALED, tensor("low", np.int8(-4)), tensor("high", np.int8(3))]
    return convolution([clip, unpack], held)


def ternary() -> onnx.ModelProto:
    return convolution([UNPACK], [tensor("q", codes(-1, 1, np.int8)), *SCALED])


def reshaped_codes() -> onnx.ModelProto:
    unpack = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["flat"], axis=0)
    shape = helper.make_node("Reshape", ["flat", "shape"], ["w"])
    held = [tensor("q", codes(-8, 7, np.int8).reshape(6, -1)), *SCALED, tensor("shape", np.array(SHAPE, np.int64))]
    return convolution([unpack, shape], held)


def constants_as_nodes() -> onnx.ModelProto:
    held = {"q": codes(-127, 127, np.int8), "s": SCALES, "z": ZEROS}
    nodes = [helper.make_node("Constant", [], [name], value=tensor("", array)) for name, array in held.items()]
    return convolution([*nodes, UNPACK], [])


FILES = [
    (plain, 4 * COUNT, 32), (int8, COUNT + PER_CHANNEL, 8), (int4_in_bytes, COUNT + PER_CHANNEL, 4),
    (int4_packed, COUNT // 2 + 6 * 4 + 3, 4), (rounded_at_load, 4 * COUNT + PER_CHANNEL, 8),
    (rounded_and_clipped, 4 * COUNT + PER_CHANNEL + 2, 4), (stored_codes_clipped, COUNT + PER_CHANNEL + 2, 3),
    (ternary, COUNT + PER_CHANNEL, 2), (reshaped_codes, COUNT + PER_CHANNEL, 4),
    (constants_as_nodes, COUNT + PER_CHANNEL, 8),
]  # fmt: skip


@pytest.mark.parametrize(("made", "size", "bits"), FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_bits_of_a_file(peers: SimpleNamespace, made: Any, size: int, bits: int) -> None:
    model = made()
    ort.InferenceSession(model.SerializeToString())  # a file that nobody can load proves nothing
    found = peers.weights.weights_in(model)
    assert found == peers.weights.Weights(COUNT, 8 * size / COUNT, bits)


def test_a_shared_weight_counts_once(peers: SimpleNamespace) -> None:
    model = int8()
    again = helper.make_node("Conv", ["x", "w"], ["unused"])
    model.graph.node.insert(1, again)
    assert peers.weights.weights_in(model) == peers.weights.weights_in(int8())


def test_computed_factors_are_no_weights(peers: SimpleNamespace) -> None:
    model = plain()
    model.graph.node.append(helper.make_node("MatMul", ["y", "y"], ["square"]))
    assert peers.weights.weights_in(model).count == COUNT


@given(st.integers(1, 8))
def test_bits_hold_the_codes(bits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        weights = importlib.import_module("peer_adapters.weights")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    found = weights.weights_in(convolution([UNPACK], [tensor("q", codes(low, high, np.int8)), *SCALED]))
    assert found.code_bits == bits


@pytest.mark.parametrize("weights", ["int3", "log4", "ternary"])
def test_the_count_is_that_of_qopt(peers: SimpleNamespace, examples: Path, weights: str) -> None:
    """Codes that share bytes, tables of levels: the file holds what the report says."""
    bundle = qopt.optimize(examples / "fashion_resnet.pt", plan=Plan(defaults=Defaults(weights=weights)), baselines=())
    found = peers.weights.weights_in(onnx.load_model_from_string(bundle.model))
    assert found.stored_bits == pytest.approx(bundle.report.size.stored_bits, abs=1e-9)
    assert found.count == bundle.report.model.weights


# the table


def row(peers: SimpleNamespace, name: str = "one", **changed: Any) -> Any:
    a, b = np.array([True] * 90 + [False] * 10), np.array([True] * 86 + [False] * 14)
    told: dict[str, Any] = {
        "code_bits": 4.0, "stored_bits": 4.1, "bytes": 182_656, "ratio": 0.155, "latency": 0.5, "integer": 20,
        "floating": 0, "clean": 91.5, "steps": 60.25, "autoattack": 55.0, "drop": paired_difference(a, b),
        "seconds": 12.4,
    }  # fmt: skip
    return peers.table.Row(name, **(told | changed))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_in_words(peers: SimpleNamespace) -> None:
    found = dict(zip(peers.table.HEADER, row(peers).cells(), strict=True))
    assert found == {
        "made by": "one", "code bits": "4.00", "stored bits": "4.10", "KB": "183", "of float": "0.155",
        "latency": "0.50", "integer kernels": "20 of 20", "clean %": "91.5", "PGD-50 %": "60.2",
        "robust drop": "+4.0 ± 2.0", "AutoAttack %": "55", "CPU s": "12",
    }  # fmt: skip
    assert row(peers, seconds=0.13).cells()[-1] == "0.1"
    assert row(peers, autoattack=None, drop=None, seconds=None).cells()[-3:] == ["", "", ""]
    assert row(peers, mark="(no gradients)").cells()[0] == "one (no gradients)"


def test_the_best_of_a_column_is_bold_whoever_it_is(peers: SimpleNamespace) -> None:
    even = paired_difference(np.ones(4, bool), np.ones(4, bool))
    floats = row(peers, "float", code_bits=1.0, steps=99.0, drop=None, seconds=None)
    first = row(peers, "first", latency=0.4, clean=90.0)
    second = row(peers, "second", latency=0.6, clean=92.0, drop=even, integer=10, floating=10)
    lines = peers.table.table([floats, first, second])
    head, *rows = [cells(line) for line in (lines[0], *lines[2:])]
    bold = {(one[0], name) for one in rows for name, cell in zip(head, one, strict=True) if cell.startswith("**")}
    same = {"code bits", "stored bits", "KB", "of float", "PGD-50 %", "CPU s"}
    expected = {(name, column) for name in ("first", "second") for column in same}
    assert bold == expected | {
        ("first", "latency"), ("first", "integer kernels"), ("second", "clean %"), ("second", "robust drop"),
    }  # fmt: skip


def test_what_looks_the_same_is_best_too(peers: SimpleNamespace) -> None:
    lines = peers.table.table([row(peers, "float"), row(peers, "a", clean=91.51), row(peers, "b", clean=91.54)])
    assert [line.count("**91.5**") for line in lines[2:]] == [0, 1, 1]


def test_a_missing_tool_is_a_row_as_wide_as_the_others(peers: SimpleNamespace) -> None:
    lines = peers.table.table([row(peers, "float"), row(peers), peers.table.Missing("other", "not installed")])
    assert {line.count("|") for line in lines} == {len(peers.table.HEADER) + 1}
    assert cells(lines[-1])[:3] == ["other", "not installed", ""]
    assert peers.table.table([row(peers, "float")])[2:]  # alone, too


def test_the_page_takes_the_tables_between_its_marks(peers: SimpleNamespace) -> None:
    page = f"# T\n\nwords\n\n{peers.table.BEGIN}\nold\n{peers.table.END}\n\nmore\n"
    once = peers.table.filled(page, "new")
    assert once == f"# T\n\nwords\n\n{peers.table.BEGIN}\n\nnew\n\n{peers.table.END}\n\nmore\n"
    assert peers.table.filled(once, "new") == once
    with pytest.raises(ValueError, match="has no"):
        peers.table.filled("# T\n", "new")
    assert peers.table.lowered("# T\n\nwords\n\n## net\n\n| a |\n") == "words\n\n## net\n\n| a |"


# tools that fail


@pytest.fixture
def job(peers: SimpleNamespace, tmp_path: Path) -> Any:
    (tmp_path / "onnx").mkdir()
    onnx.save(plain(), tmp_path / "onnx" / "net.onnx")
    images, labels = np.zeros((5, 3, 4, 4), np.float32), np.arange(5)
    return peers.job.Job(tmp_path, "net", "2/255", images, labels, tmp_path, "W4A8")


def adapter(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch, peers: SimpleNamespace) -> None:
    """A package of adapters with one more, ``made_up``."""
    package = tmp_path / "peer_adapters"
    package.mkdir()
    for name in ("__init__", "job"):
        (package / f"{name}.py").write_text((BENCHMARKS / "peer_adapters" / f"{name}.py").read_text())
    head = "from peer_adapters.job import Job, run\nimport shutil\ndef quantize(job: Job):\n    "
    (package / "made_up.py").write_text(f"{head}{body}\nrun('numpy', quantize)\n")
    monkeypatch.setattr(peers.quantized, "BENCHMARKS", tmp_path)


def made_up(peers: SimpleNamespace, package: str = "numpy") -> Any:
    return peers.quantized.Peer("Made up", "made", package, "made_up", "W4A8")


def test_a_job_is_read_as_it_was_written(peers: SimpleNamespace, job: Any) -> None:
    peers.job.write_job(job)
    found = peers.job.read_job(job.out)
    assert (found.assets, found.network, found.eps, found.setting) == (job.assets, "net", "2/255", "W4A8")
    np.testing.assert_array_equal(found.images, job.images)
    np.testing.assert_array_equal(found.labels, job.labels)
    assert found.input == "x"
    assert [len(batch) for batch in found.batches(2)] == [2, 2, 1]


def test_a_tool_that_works_is_run_once(
    peers: SimpleNamespace, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "shutil.copy(job.onnx, job.file); return {'note': job.setting, 'code_bits': len(job.images)}"
    adapter(tmp_path, body, monkeypatch, peers)
    cache = Cache(tmp_path / "cache")
    first = peers.quantized.quantized(made_up(peers), job, cache, 60)
    assert first.file == job.onnx.read_bytes()
    assert first.facts["note"] == "W4A8"
    assert first.facts["code_bits"] == 5
    assert first.facts["version"] == np.__version__
    assert 0 <= first.facts["seconds"] < 60
    assert cache.hits == []
    assert peers.quantized.quantized(made_up(peers), job, cache, 60) == first
    assert cache.hits == ["peers"]


FAILURES = [
    ("raise RuntimeError('no | such layer')", 60.0, "failed: RuntimeError: no / such layer"),
    ("raise SystemExit(3)", 60.0, "failed: ended with 3"),
    ("return {}", 60.0, "failed: ended with 0"),
    ("__import__('os').kill(__import__('os').getpid(), 9)", 60.0, "failed: ended with -9"),
    ("__import__('time').sleep(60)", 1.0, "failed: no end after 1 s"),
]


@pytest.mark.parametrize(("body", "limit", "words"), FAILURES)
def test_a_tool_that_fails_says_so(
    peers: SimpleNamespace, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, limit: float,
    words: str,
) -> None:  # fmt: skip
    adapter(tmp_path, body, monkeypatch, peers)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(peers.quantized.PeerFailed) as caught:
        peers.quantized.quantized(made_up(peers), job, cache, limit)
    assert str(caught.value) == words
    assert not (tmp_path / "cache").exists()  # it may work the next time


def test_a_tool_that_is_not_there_is_named(peers: SimpleNamespace, job: Any) -> None:
    with pytest.raises(peers.quantized.PeerFailed, match="not installed: pip install no-such-tool"):
        peers.quantized.quantized(made_up(peers, "no-such-tool"), job, Cache(None), 60)


def test_failures_do_not_end_the_run(
    peers: SimpleNamespace, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path, "raise ValueError('odd')", monkeypatch, peers)
    asked = (made_up(peers), made_up(peers, "no-such-tool"))
    found = peers.main.emit_all(asked, job, Cache(None), 60)
    assert [str(found[peer]) for peer in asked] == [
        "failed: ValueError: odd", "not installed: pip install no-such-tool",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"), [("", ""), ("a\n\n b c \n\n", "b c"), ("x" * 500, "x" * 160), ("a|b", "a/b")]
)
def test_the_last_line_with_words(peers: SimpleNamespace, text: str, words: str) -> None:
    assert peers.quantized.last_line(text) == words


# attacks


def test_files_are_attacked_and_the_worst_counts(peers: SimpleNamespace, tmp_path: Path) -> None:
    """The brighter of two channels is the class: an image withstands where they are more than 2 eps apart."""
    weight = np.zeros(SHAPE, np.float32)
    weight[0, 0], weight[1, 1] = 1, 1
    onnx.save(convolution([], [tensor("w", weight)]), tmp_path / "float.onnx")
    packed = [tensor("q", (weight * 7).astype(np.int8)), tensor("s", np.full(6, 1 / 7, np.float32)), tensor("z", ZEROS)]
    onnx.save(convolution([UNPACK], packed), tmp_path / "model.onnx")
    pictures = np.zeros((4, 3, 4, 4), np.float32)
    for picture, levels in zip(pictures, ((0.52, 0.5), (0.9, 0.1), (0.7, 0.5), (0.1, 0.9)), strict=True):
        picture[0], picture[1] = levels
    part = Split(pictures, np.zeros(4, np.int64))
    arena = peers.attacked.Arena(
        tmp_path / "float.onnx", Data(part, part, part), ThreatModel("linf", 0.05), 3, 1, Cache(tmp_path / "cache"),
        lambda step: None,
    )  # fmt: skip
    for name in ("float.onnx", "model.onnx"):
        found = arena.attack(tmp_path / name)
        assert found.clean.tolist() == [True, True, True, False]
        assert found.steps.tolist() == [False, True, True]
        assert found.autoattack.tolist() == [False]
        assert found.gradients
    made = arena.examples().numpy()
    assert made.shape == (3, 3, 4, 4)
    assert np.abs(made - pictures[:3]).max() <= 0.05 + 1e-6
    assert len(list((tmp_path / "cache" / "peers_examples").iterdir())) == 1


# the log, the page and the requirements


def test_tools_are_named_once_and_have_adapters(peers: SimpleNamespace) -> None:
    names = [peer.name for peer in peers.main.PEERS]
    assert len(set(names)) == len(names)
    for peer in peers.main.PEERS:
        text = (BENCHMARKS / "peer_adapters" / f"{peer.adapter}.py").read_text()
        assert f'run("{peer.package}", quantize)' in text
        assert not peer.setting or f'"{peer.setting}"' in text


def test_requirements_pin_every_tool(peers: SimpleNamespace) -> None:
    lines = (ROOT / "requirements-peers.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert {peer.package for peer in peers.main.PEERS} - {"qopt"} <= pinned


def test_asked_tools(
    peers: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {peer.asked for peer in peers.main.asked_peers("nncf, qopt")} == {"nncf", "qopt"}
    monkeypatch.setattr(sys, "argv", ["peers.py", "--peers", "nobody"])
    with pytest.raises(SystemExit, match="2"):
        peers.main.main()
    assert "unknown: nobody" in capsys.readouterr().err


def test_the_page_holds_the_tables_of_the_log(peers: SimpleNamespace) -> None:
    log, page = peers.main.RESULTS.read_text(), peers.main.PAGE.read_text()
    assert peers.table.filled(page, peers.table.lowered(log)) == page


def test_the_log_says_when_where_and_how(peers: SimpleNamespace) -> None:
    log = peers.main.RESULTS.read_text()
    assert re.search(r"^20\d\d-\d\d-\d\d; .*\d+ cores", log, re.MULTILINE)
    assert "`OMP_NUM_THREADS=1 python benchmarks/peers.py " in log
    versions = [f"{peer.package} " for peer in peers.main.PEERS]
    assert [name for name in versions if name not in log] == []
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", log)
    tables = re.findall(r"^## (\w+), linf", log, re.MULTILINE)
    assert tables == list(peers.main.NETWORKS)
    rows = [cells(line)[0] for line in log.splitlines() if line.startswith("| ") and "made by" not in line]
    assert len(rows) == len(tables) * (1 + len(peers.main.PEERS))
