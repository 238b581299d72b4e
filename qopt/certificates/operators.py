"""What each function of the twin becomes: the table that `qopt.certificates.reader.Reader` looks calls up in."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qopt.certificates.curves import Clamp, Leaky, Smooth, Staircase
from qopt.certificates.maps import Average, Convolution, Product, Scaling
from qopt.certificates.network import Bend, Concat, Maximum, Sum
from qopt.certificates.reader import Handler, Reader
from qopt.graph.operators import activation, arithmetic, convolution, packed_product, pooling, quantization
from qopt.graph.operators import shape as moves
from qopt.graph.operators.reduction import plain_sum
from qopt.quant import ActivationQuantizer

_TABLE: Final[dict[Any, Handler]] = {}

_MOVES: Final = (
    torch.clone, torch.reshape, moves.reshape_like, torch.flatten, moves.as_matrix, torch.permute, moves.reverse_axes,
    torch.squeeze, moves.squeeze_all, torch.unsqueeze, moves.unsqueeze_all, moves.broadcast, moves.repeat,
    moves.sliced, torch.select, moves.gathered, moves.padded,
)  # fmt: skip


def _enter(*targets: Any) -> Callable[[Handler], Handler]:
    def enter(handler: Handler) -> Handler:
        _TABLE.update(dict.fromkeys(targets, handler))
        return handler

    return enter


def handler_of(reader: Reader, node: Node) -> Handler | None:
    """How to read a node; None where no rule is known."""
    if node.op == "call_module":
        module = reader.twin.get_submodule(str(node.target))
        return _quantizer if isinstance(module, ActivationQuantizer) else None
    return _TABLE.get(node.target)


def _source(reader: Reader, node: Node, index: int = 0) -> int | None:
    """The step of argument ``index`` where it is the only argument that a pixel changes."""
    varying = [a for a in node.all_input_nodes if a in reader.places]
    argument = node.args[index] if len(node.args) > index else None
    return reader.places[argument] if isinstance(argument, Node) and varying == [argument] else None


@_enter(*_MOVES)
def _move(reader: Reader, node: Node) -> int:
    argument = node.args[0]
    if _source(reader, node) is None or not isinstance(argument, Node):
        return reader.opaque(node)
    return reader.moved(node, argument, lambda x: reader.call(node, x))


@_enter(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(reader: Reader, node: Node) -> int:
    source = _source(reader, node)
    if source is None:
        return reader.opaque(node)
    return _convolved(reader, node, source, node.args[3:7])


@_enter(convolution.conv_padded)
def _padded_convolution(reader: Reader, node: Node) -> int:
    argument = node.args[0]
    if _source(reader, node) is None or not isinstance(argument, Node):
        return reader.opaque(node)
    stride, before, after, dilation, groups = node.args[3:8]
    pads = convolution.torch_pads(before, after)  # type: ignore[arg-type]
    source = reader.moved(node, argument, lambda x: F.pad(x, pads))
    return _convolved(reader, node, source, (stride, (0,) * len(pads[::2]), dilation, groups))


def _convolved(reader: Reader, node: Node, source: int, window: tuple[Any, ...]) -> int:
    weight, bias = reader.constant(node.args[1]), reader.constant(node.args[2])
    assert weight is not None
    stride, padding, dilation, groups = window
    offset = None if bias is None else bias.reshape(-1, *[1] * (weight.ndim - 2))
    shape = reader.steps[source].shape
    return reader.affine(node, source, Convolution(weight, offset, shape, stride, padding, dilation, groups))


@_enter(F.linear, convolution.linear_matrix_bias)
def _linear(reader: Reader, node: Node) -> int:
    return _product(reader, node, lambda weight: weight, 1.0, 1.0)


@_enter(convolution.affine, torch.matmul)
def _plain_product(reader: Reader, node: Node) -> int:
    return _product(reader, node, lambda weight: weight.T, 1.0, 1.0)


@_enter(convolution.scaled_product)
def _scaled(reader: Reader, node: Node) -> int:
    transposed_image, transposed, alpha, beta = node.args[3:7]
    if transposed_image:
        return reader.opaque(node)
    return _product(reader, node, lambda weight: weight if transposed else weight.T, float(alpha), float(beta))  # type: ignore[arg-type]


def _product(reader: Reader, node: Node, turn: Callable[[Tensor], Tensor], alpha: float, beta: float) -> int:
    source = _source(reader, node)
    weight = reader.constant(node.args[1]) if source is not None else None
    if source is None or weight is None or weight.ndim != 2:
        return reader.opaque(node)
    bias = reader.constant(node.args[2]) if len(node.args) > 2 else None
    offset = None if bias is None else reader.per_image(node, beta * bias)
    return reader.affine(node, source, Product(alpha * turn(weight), offset))


@_enter(packed_product.packed_product)
def _packed(reader: Reader, node: Node) -> int:
    source = _source(reader, node)
    if source is None:
        return reader.opaque(node)
    known: list[Any] = [reader.values[a] if isinstance(a, Node) else a for a in node.args[1:]]
    codes, scales, zeros, bias, *sizes = known
    weight = packed_product.unpacked(codes, scales, zeros, *sizes).double()
    return reader.affine(node, source, Product(weight, None if bias is None else bias.double()))


@_enter(torch.add, arithmetic.added)
def _add(reader: Reader, node: Node) -> int:
    return _sum(reader, node, (1,) * len(node.args))


@_enter(torch.sub)
def _subtract(reader: Reader, node: Node) -> int:
    return _sum(reader, node, (1, -1))


def _sum(reader: Reader, node: Node, signs: tuple[int, ...]) -> int:
    shape = reader.shape(node)
    varying = [(a, s) for a, s in zip(node.args, signs, strict=True) if isinstance(a, Node) and a in reader.places]
    fixed = [(reader.constant(a), s) for a, s in zip(node.args, signs, strict=True) if (a, s) not in varying]
    inputs = tuple(reader.expanded(node, reader.places[a], shape) for a, _ in varying)
    place = inputs[0]
    if len(inputs) > 1 or varying[0][1] < 0:
        place = reader.add(Sum, node, inputs, tuple(s for _, s in varying))
    for constant, sign in fixed:
        assert constant is not None
        place = reader.affine(node, place, Scaling(None, reader.per_image(node, sign * constant)))
    return place


@_enter(torch.mul)
def _multiply(reader: Reader, node: Node) -> int:
    factors = [reader.constant(a) for a in node.args]
    known = [f for f in factors if f is not None]
    varying = [a for a in node.args if isinstance(a, Node) and a in reader.places]
    if len(known) != 1 or len(varying) != 1:
        return reader.opaque(node)
    return _scaled_by(reader, node, varying[0], known[0])


@_enter(torch.div, arithmetic.divide)
def _divide(reader: Reader, node: Node) -> int:
    factor = reader.constant(node.args[1])
    if factor is None or not isinstance(node.args[0], Node) or bool((factor == 0).any()):
        return reader.opaque(node)
    return _scaled_by(reader, node, node.args[0], 1 / factor)


@_enter(torch.neg)
def _negate(reader: Reader, node: Node) -> int:
    argument = node.args[0]
    assert isinstance(argument, Node)
    return _scaled_by(reader, node, argument, torch.tensor(-1.0, dtype=torch.float64))


def _scaled_by(reader: Reader, node: Node, argument: Node, factor: Tensor) -> int:
    source = reader.expanded(node, reader.places[argument], reader.shape(node))
    return reader.affine(node, source, Scaling(reader.per_image(node, factor), None))


@_enter(F.batch_norm)
def _batch_norm(reader: Reader, node: Node) -> int:
    source = _source(reader, node)
    if source is None:
        return reader.opaque(node)
    mean, variance, scale, shift = (reader.values[a].double() for a in node.args[1:5] if isinstance(a, Node))
    epsilon = float(node.args[7])  # type: ignore[arg-type]
    factor = scale / torch.sqrt(variance + epsilon)
    beside = (-1, *[1] * (len(reader.shape(node)) - 1))
    # in two steps, so that the rounding of ``x - mean`` and of the folded form are both inside what is allowed for
    centred = reader.affine(node, source, Scaling(None, -mean.reshape(beside), terms=8))
    return reader.affine(node, centred, Scaling(factor.reshape(beside), shift.reshape(beside), terms=16))


@_enter(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, pooling.average_pool_padded)
def _average_pool(reader: Reader, node: Node) -> int:
    kernel: Any = node.args[1]
    return _average(reader, node, prod(kernel))


@_enter(torch.mean, plain_sum)
def _mean(reader: Reader, node: Node) -> int:
    source, axes = _source(reader, node), node.args[1]
    size = () if source is None else (1, *reader.steps[source].shape)
    places: Any = axes if isinstance(axes, (tuple, list)) else (axes,)
    if source is None or not all(isinstance(a, int) and a % len(size) for a in places):
        return reader.opaque(node)
    return _average(reader, node, prod(size[a] for a in places))


def _average(reader: Reader, node: Node, terms: int) -> int:
    source = _source(reader, node)
    if source is None:
        return reader.opaque(node)
    return reader.affine(node, source, Average(lambda x: reader.call(node, x), reader.steps[source].shape, terms + 2))


@_enter(F.max_pool1d, F.max_pool2d, pooling.max_pool_padded)
def _max_pool(reader: Reader, node: Node) -> int:
    if node.target is pooling.max_pool_padded:
        kernel, stride, before, after, dilation, ceil = node.args[1:7]
    else:
        kernel, stride, before, dilation, ceil = node.args[1:6]
        after = before
    source = _source(reader, node)
    if source is None or len(kernel) > 2:  # type: ignore[arg-type]
        return reader.opaque(node)
    shape = reader.steps[source].shape
    ends = pooling.last_pads(shape[1:], kernel, stride, before, after, dilation, bool(ceil))  # type: ignore[arg-type]
    return reader.add(Maximum, node, (source,), _windows(shape, kernel, stride, before, ends, dilation))


def _windows(shape: tuple[int, ...], kernel: Any, stride: Any, before: Any, ends: Any, dilation: Any) -> Tensor:
    """Places in the flattened source that each output is the largest of, -1 for padding: (outputs, window)."""
    places = torch.arange(1, prod(shape) + 1, dtype=torch.float64).reshape(1, *shape)
    padded = F.pad(places, convolution.torch_pads(before, ends))
    if len(kernel) == 1:
        padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    channels = padded.reshape(shape[0], 1, *padded.shape[-2:])
    found = F.unfold(channels, kernel, dilation=dilation, stride=stride)
    return found.transpose(1, 2).reshape(-1, prod(kernel)).round().to(torch.int64) - 1


@_enter(torch.amax)
def _global_max(reader: Reader, node: Node) -> int:
    source, axes = _source(reader, node), node.args[1]
    shape = () if source is None else reader.steps[source].shape
    if source is None or axes != tuple(range(2, len(shape) + 1)):
        return reader.opaque(node)
    return reader.add(Maximum, node, (source,), torch.arange(prod(shape)).reshape(shape[0], -1))


@_enter(torch.cat)
def _concat(reader: Reader, node: Node) -> int:
    parts, axis = node.args
    assert isinstance(parts, (tuple, list))
    assert isinstance(axis, int)
    axis %= len(reader.shape(node)) + 1
    if axis == 0 or not all(isinstance(p, Node) and p in reader.places for p in parts):
        return reader.opaque(node)
    return reader.add(Concat, node, tuple(reader.places[p] for p in parts if isinstance(p, Node)), axis - 1)


def _bent(reader: Reader, node: Node, curve: Any) -> int:
    argument = node.args[0]
    assert isinstance(argument, Node)
    return reader.add(Bend, node, (reader.places[argument],), curve)


def _number(value: Any) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


@_enter(torch.relu)
def _relu(reader: Reader, node: Node) -> int:
    return _bent(reader, node, Clamp(_number(0.0), _number(math.inf)))


@_enter(torch.clamp)
def _clamp(reader: Reader, node: Node) -> int:
    low, high = (*node.args[1:], None, None)[:2]
    floor, ceiling = (-math.inf if low is None else low), (math.inf if high is None else high)
    # the numbers that float32 clips to
    return _bent(reader, node, Clamp(_number(floor).float().double(), _number(ceiling).float().double()))


@_enter(activation.clipped_line)
def _clipped_line(reader: Reader, node: Node) -> int:
    source, (_, alpha, beta) = _source(reader, node), node.args
    if source is None:
        return reader.opaque(node)
    line = reader.affine(node, source, Scaling(_number(alpha), _number(beta), terms=2))
    return reader.add(Bend, node, (line,), Clamp(_number(0.0), _number(1.0)))


@_enter(F.leaky_relu)
def _leaky(reader: Reader, node: Node) -> int:
    factor = float(node.args[1])  # type: ignore[arg-type]
    return _bent(reader, node, Leaky(_number(factor))) if 0 <= factor <= 1 else reader.opaque(node)


@_enter(activation.sloped)
def _sloped(reader: Reader, node: Node) -> int:
    factor = reader.constant(node.args[1])
    if factor is None or not bool(((factor >= 0) & (factor <= 1)).all()):
        return reader.opaque(node)
    return _bent(reader, node, Leaky(reader.per_image(node, factor)))


_SMOOTH: Final[dict[Any, Smooth]] = {
    torch.sigmoid: Smooth(torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), 0.25),
    torch.tanh: Smooth(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, 1.0),
    torch.erf: Smooth(torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x), 2 / math.sqrt(math.pi)),
    F.softplus: Smooth(F.softplus, torch.sigmoid, 1.0),
}


@_enter(*_SMOOTH)
def _smooth(reader: Reader, node: Node) -> int:
    return _bent(reader, node, _SMOOTH[node.target])


def _quantizer(reader: Reader, node: Node) -> int:
    module = reader.twin.get_submodule(str(node.target))
    assert isinstance(module, ActivationQuantizer)
    last = (1 << module.bits) - 1
    return _bent(reader, node, Staircase(module.scale.detach(), module.zero_point.float(), 0, last))


@_enter(quantization.quantized)
def _codes(reader: Reader, node: Node) -> int:
    source = _source(reader, node)
    scale = reader.constant(node.args[1])
    if source is None or scale is None or not isinstance(node.args[0], Node):
        return reader.opaque(node)
    zero, (low, high, axis, block) = reader.constant(node.args[2]), node.args[3:7]
    values = reader.values[node.args[0]]
    steps = reader.per_image(node, quantization.beside(scale, values, axis, block)).float()  # type: ignore[arg-type]
    shift = torch.zeros(()) if zero is None else quantization.beside(zero, values, axis, block).float()  # type: ignore[arg-type]
    return _bent(reader, node, Staircase(steps, reader.per_image(node, shift), int(low), int(high), codes=True))  # type: ignore[arg-type]


@_enter(quantization.dequantized)
def _numbers(reader: Reader, node: Node) -> int:
    source, scale = _source(reader, node), reader.constant(node.args[1])
    if source is None or scale is None or not isinstance(node.args[0], Node):
        return reader.opaque(node)
    zero, (axis, block) = reader.constant(node.args[2]), node.args[3:5]
    codes = reader.values[node.args[0]]
    steps = reader.per_image(node, quantization.beside(scale, codes, axis, block))  # type: ignore[arg-type]
    if zero is not None:
        shift = reader.per_image(node, quantization.beside(zero, codes, axis, block))  # type: ignore[arg-type]
        source = reader.affine(node, source, Scaling(None, -shift, terms=0))  # whole numbers: exact in float32
    return reader.affine(node, source, Scaling(steps, None))
