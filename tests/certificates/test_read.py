"""What each operator of the twin becomes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from qopt.certificates.ball import Ball
from qopt.certificates.curves import Clamp, Leaky, Smooth, Staircase
from qopt.certificates.interval import intervals
from qopt.certificates.maps import Average, Convolution, Pick, Product, Scaling
from qopt.certificates.network import Affine, Bend, Concat, Maximum, Network, Opaque, Sum, difference
from qopt.certificates.read import read
from qopt.errors import UnsupportedModelError
from qopt.graph.operators.packed_product import packed_product, unpacked
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin

from .conftest import NETWORKS, Case, parse


def kinds(network: Network) -> list[str]:
    found = []
    for step in network.steps[1:]:
        inner: Any = step.map if isinstance(step, Affine) else step.curve if isinstance(step, Bend) else step
        found.append(type(inner).__name__)
    return found


EXPECTED: dict[str, list[type]] = {
    "plain": [Convolution, Clamp, Pick, Convolution, Clamp, Pick, Product],
    "residual": [Convolution, Clamp, Convolution, Convolution, Sum, Clamp, Average, Pick, Product],
    "concat": [Convolution, Convolution, Clamp, Concat, Convolution, Clamp, Pick, Product],
    "overlap": [Convolution, Clamp, Maximum, Convolution, Clamp, Average, Pick, Product],
    "norm": [Convolution, Clamp, Scaling, Scaling, Clamp, Sum, Convolution, Pick, Product],
    "clipped": [Scaling, Scaling, Convolution, Clamp, Convolution, Leaky, Average, Pick, Product],
    "smooth": [Pick, Product, Smooth, Product, Smooth, Product],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_steps_of_a_network(name: str, cases: Callable[..., Case]) -> None:
    case = cases(name)
    assert kinds(read(case.float_twin, case.shape)) == [kind.__name__ for kind in EXPECTED[name]]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_point_is_the_network_itself(name: str, cases: Callable[..., Case]) -> None:
    """On a ball of one image the intervals are the logits, up to rounding: nothing is lost or doubled on the way."""
    case = cases(name)
    images = case.images(3).double()
    box = intervals(read(case.twin, case.shape), Ball(images, images, images, None))[-1]
    logits = case.twin(images.float()).double()
    assert torch.allclose(box.low, logits, atol=1e-3)
    assert torch.allclose(box.high, logits, atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_quantizers_become_staircases(name: str, cases: Callable[..., Case]) -> None:
    found = kinds(read(cases(name, "w4a3").twin, cases(name).shape))
    assert found.count(Staircase.__name__) >= 2


def test_a_difference_reads_the_image_twice(cases: Callable[..., Case]) -> None:
    case = cases("residual", "w4")
    first, second = read(case.twin, case.shape), read(case.float_twin, case.shape)
    both = difference(first, second)
    assert len(both.steps) == len(first.steps) + len(second.steps)
    assert both.readers()[0] == first.readers()[0] + second.readers()[0]
    images = case.images(2).double()
    box = intervals(both, Ball(images, images, images, None))[-1]
    expected = (case.twin(images.float()) - case.float_twin(images.float())).double()
    assert torch.allclose((box.low + box.high) / 2, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_product(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 256, (3, 2, 16 * bits // 8), generator=generator, dtype=torch.uint8)
    scales, bias = torch.rand(6, generator=generator), torch.rand(3, generator=generator)
    graph, root = fx.Graph(), torch.nn.Module()
    for key, tensor in (("codes", codes), ("scales", scales), ("bias", bias)):
        root.register_buffer(key, tensor)
    x = graph.placeholder("x")
    names = [graph.get_attr(key) for key in ("codes", "scales")]
    graph.output(graph.call_function(packed_product, (x, *names, None, graph.get_attr("bias"), 3, 32, bits, 16)))
    network = read(fx.GraphModule(root, graph), (32,))
    step = network.steps[-1]
    assert isinstance(step, Affine)
    assert isinstance(step.map, Product)
    assert torch.equal(step.map.weight.float(), unpacked(codes, scales, None, 3, 32, bits, 16))


OPAQUE = {
    "Softmax": "h = Gemm <transB = 1> (x, w) y = Softmax (h)",
    "Exp": "h = Exp (x) y = Gemm <transB = 1> (h, w)",
}


@pytest.mark.parametrize("op", ["Softmax", "Exp"])
def test_what_bounds_do_not_pass_is_opaque(op: str) -> None:
    text = f"(float[n,4] x, float[3,4] w) => (float[n,3] y) {{ {OPAQUE[op]} }}"
    network = read(build_twin(prepare(parse(text))), (4,))
    assert [step.op for step in network.steps if isinstance(step, Opaque)] == [op]


def one_call(function: Any, *rest: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(function, (x, *rest)))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (one_call(torch.permute, (1, 0)), "batch axis"),
        (one_call(torch.reshape, (-1,)), "one row of numbers|batch axis"),
        (one_call(torch.reshape, (7, 2)), "does not run on one image"),
        (one_call(torch.unsqueeze, 1), "one row of numbers"),
    ],
)
def test_what_is_refused(twin: fx.GraphModule, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(twin, (4,))


def test_several_inputs_are_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.add, (graph.placeholder("a"), graph.placeholder("b"))))
    with pytest.raises(UnsupportedModelError, match=r"input|image"):
        read(fx.GraphModule(torch.nn.Module(), graph), (4,))
