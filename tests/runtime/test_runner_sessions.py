"""Sessions: batches cut and padded, garbage refused in one line, nothing printed, fair latencies, counted kernels."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qopt.errors import DataError, UnsupportedModelError, UsageError
from qopt.runtime.kernels import FLOAT, INTEGER, count_kernels
from qopt.runtime.latency import fastest, measure_latency
from qopt.runtime.session import BATCH, Runner, open_session


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 12)).astype(np.float32)


def by_hand(network: bytes, pixels: np.ndarray) -> np.ndarray:
    w, b = (onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(network).graph.initializer)
    return np.asarray(np.maximum(pixels @ w + b, 0))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_a_fixed_batch_is_padded_and_cut(count: int, network_of_four: bytes) -> None:
    pixels = rows(count)
    logits = Runner(network_of_four, batch=4)(pixels)
    assert logits.shape == (count, 5)
    assert logits.dtype == np.float32
    assert np.allclose(logits, by_hand(network_of_four, pixels), atol=1e-5)


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 3])
def test_a_free_batch_is_run_in_chunks(count: int, network: bytes) -> None:
    pixels = rows(count)
    logits = Runner(network)(pixels)
    assert logits.shape == (count, 5)
    assert np.allclose(logits, by_hand(network, pixels), atol=1e-5)


def test_images_of_any_memory_layout(network: bytes) -> None:
    pixels = np.asfortranarray(rows(7))
    assert np.allclose(Runner(network)(pixels[::-1]), by_hand(network, pixels[::-1]), atol=1e-5)


def test_the_padding_is_needed(network_of_four: bytes) -> None:
    """A graph of batch 4 refuses 3 images: without the batch given, the runner could not help."""
    with pytest.raises(Exception, match="Got: 3 Expected: 4"):
        Runner(network_of_four)(rows(3))


def test_no_images(network: bytes, network_of_four: bytes) -> None:
    for runner in (Runner(network), Runner(network_of_four, batch=4)):
        with pytest.raises(DataError, match="no images"):
            runner(rows(0))


def test_threads_do_not_change_the_logits(network: bytes) -> None:
    assert np.array_equal(Runner(network, threads=2)(rows(9)), Runner(network)(rows(9)))


def broken(network: bytes, change: str) -> bytes:
    proto = onnx.load_from_string(network)
    if change == "operator":
        proto.graph.node[0].op_type = "NoSuchOperator"
    elif change == "domain":
        proto.graph.node[0].domain = "nobody.knows"
    elif change == "opset":
        proto.opset_import[0].version = 999
    else:
        proto.graph.node[0].input[1] = "missing"
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize("change", ["operator", "domain", "opset", "input"])
def test_a_graph_that_onnxruntime_refuses(change: str, network: bytes, tmp_path: Path) -> None:
    data = broken(network, change)
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime cannot load the graph") as caught:
        open_session(data)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    for load in (open_session, count_kernels, Runner):
        with pytest.raises(UnsupportedModelError, match=r"^broken\.onnx: "):
            load(path)


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a model at all", b"\xff" * 1000, b"PK\x03\x04" + b"a" * 50])
def test_garbage(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    for model in (content, path):
        with pytest.raises(UnsupportedModelError) as caught:
            open_session(model)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^nowhere\.onnx: "):
        open_session(tmp_path / "nowhere.onnx")


def test_bytes_and_path_are_the_same(network: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a file.onnx"
    path.write_bytes(network)
    assert np.array_equal(Runner(path)(rows(3)), Runner(network)(rows(3)))
    assert count_kernels(path) == count_kernels(network)


def test_the_optimised_graph_is_written_where_asked(network: bytes, tmp_path: Path) -> None:
    open_session(network, optimized=tmp_path / "o.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["FusedGemm"]


def test_a_float_graph_has_no_integer_kernel(network: bytes) -> None:
    kernels = count_kernels(network)
    assert (kernels.integer, kernels.float_) == (0, 1)
    assert kernels.counts == {"FusedGemm": 1}


def test_kernels_of_a_quantized_product() -> None:
    """Dynamic quantization by ONNX Runtime's own operators is counted too, and what is neither is not."""
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT32, ["n", 3])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["y"]),
    ]
    weight = onnx.numpy_helper.from_array(np.arange(12, dtype=np.int8).reshape(4, 3), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    kernels = count_kernels(proto.SerializeToString())
    assert (kernels.integer, kernels.float_) == (1, 0)
    assert kernels.counts == {"DynamicQuantizeLinear": 1, "MatMulInteger": 1}


def test_no_kernel_is_both() -> None:
    assert not INTEGER & FLOAT


def test_calls_are_interleaved() -> None:
    order: list[str] = []
    times = fastest({name: lambda name=name: order.append(name) for name in "abc"}, repeats=4)  # type: ignore[misc]
    assert "".join(order) == "abc" * 5  # one round to warm up
    assert list(times) == ["a", "b", "c"]
    assert all(0 <= t < 1 for t in times.values())


def test_the_shortest_time_counts() -> None:
    naps = iter([0.0, 0.05, 0.002, 0.05])
    found = fastest({"nap": lambda: time.sleep(next(naps))}, repeats=3)["nap"]
    assert 0.002 <= found < 0.05


@pytest.mark.parametrize("repeats", [0, -1])
def test_a_measurement_needs_a_repeat(repeats: int) -> None:
    with pytest.raises(UsageError, match="too few repeats"):
        fastest({}, repeats)


def test_latencies_are_positive_and_ordered(network: bytes, network_of_four: bytes, wide_network: bytes) -> None:
    found = measure_latency({"small": network, "again": network}, (12,), batch=2, repeats=20)
    assert list(found) == ["small", "again"]
    assert all(0 < t < 1 for t in found.values())
    wide = measure_latency({"wide": wide_network}, (40_000,), repeats=5)
    assert wide["wide"] > found["small"]
    assert measure_latency({"four": network_of_four}, (12,), batch=4, repeats=1)["four"] > 0
    assert measure_latency({}, (12,)) == {}


def test_latency_of_a_graph_that_does_not_load(network: bytes) -> None:
    with pytest.raises(UnsupportedModelError):
        measure_latency({"good": network, "bad": b"bad"}, (12,), repeats=1)
