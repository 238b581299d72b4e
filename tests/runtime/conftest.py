from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper


def _network(batch: int | str = "n", width: int = 12) -> bytes:
    """Logits (n, 5) of features (n, 12): one Gemm and a ReLU, weights all different."""
    generator = np.random.default_rng(0)
    constants = {"w": generator.standard_normal((width, 5)), "b": generator.standard_normal(5)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"]), helper.make_node("Relu", ["y"], ["logits"])]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, width])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [image], [logits], stored)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )


@pytest.fixture(scope="session")
def network() -> bytes:
    """A graph that takes any batch."""
    return _network()


@pytest.fixture(scope="session")
def network_of_four() -> bytes:
    """The same with the batch axis fixed to 4."""
    return _network(batch=4)


@pytest.fixture(scope="session")
def wide_network() -> bytes:
    """Much more work than `network`."""
    return _network(width=40_000)
