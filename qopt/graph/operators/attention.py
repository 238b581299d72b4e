"""Attention and rotary positions, as opsets 23 and newer have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator


@operator("Attention")
def attention(op: Op) -> Call:
    """Grouped heads, masks, caches, soft caps and windows; every output that is read."""
    options = {
        "scale": op.number("scale", 0.0) if op.has("scale") else None,
        "causal": bool(op.integer("is_causal", 0)),
        "heads": (op.integer("q_num_heads", 0), op.integer("kv_num_heads", 0)),
        "softcap": op.number("softcap", 0.0),
        "shown": op.integer("qk_matmul_output_mode", 0),
        "window": (op.integer("left_window_size", -1), op.integer("right_window_size", -1)),
    }
    tensors = (op.arg(0), op.arg(1), op.arg(2), *(op.optional(index) for index in range(3, 7)))
    return Call(attended, tensors, options, parts=True)


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, past_key: Tensor | None, past_value: Tensor | None,
    lengths: Tensor | None, *, scale: float | None, causal: bool, heads: tuple[int, int], softcap: float, shown: int,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1) over (batch, heads, places, features).

    Tensors of three axes hold their ``heads`` side by side in the last one. A query that may see nothing gets zeros.

    Returns:
        The result in the form of ``query``, the keys and values with those of the past before them, and the scores as
        ``shown`` says: 0 raw, 1 capped, 2 masked, 3 after the softmax.
    """
    flat = query.ndim == 3
    if flat:
        query, key, value = _split(query, heads[0]), _split(key, heads[1]), _split(value, heads[1])
    offset: int | Tensor = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    elif lengths is not None:
        offset = lengths.reshape(-1, 1, 1, 1) - query.shape[2]
    bias = _bias(query, key, mask, offset, causal, window, lengths)
    shared = query.shape[1] // key.shape[1]
    keys, values = (part.repeat_interleave(shared, 1) if shared > 1 else part for part in (key, value))
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    raw = (query * root) @ (keys * root).transpose(-1, -2)
    capped = torch.tanh(raw / softcap) * softcap if softcap > 0 else raw
    masked = capped if bias is None else capped + bias
    weights = _softmax(masked, bias)
    result = weights @ values
    if flat:
        result = result.transpose(1, 2).flatten(2)
    return result, key, value, (raw, capped, masked, weights)[shown]


def _split(x: Tensor, heads: int) -> Tensor:
    """(batch, places, heads * features) to (batch, heads, places, features)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.softmax(scores, -1)
    blind = torch.isneginf(bias).all(-1, keepdim=True)
    return torch.where(blind, 0.0, torch.softmax(torch.where(blind, 0.0, scores), -1))


def _bias(
    query: Tensor, key: Tensor, mask: Tensor | None, offset: int | Tensor, causal: bool, window: tuple[int, int],
    lengths: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """What is added to the scores, broadcast to (batch, heads, queries, keys): minus infinity hides a key."""
    size = key.shape[2]
    parts: list[Tensor] = []
    if mask is not None:
        parts.append(_as_bias(mask, query.dtype, size))
    place = torch.arange(query.shape[2], device=query.device)[:, None] + offset
    ahead = torch.arange(size, device=query.device)[None, :] - place
    limits = ((0, window[1])[not causal :], (window[0],))
    for sign, bounds in zip((1, -1), limits, strict=True):
        parts += [_hidden(sign * ahead <= bound, query.dtype) for bound in bounds if bound >= 0]
    if lengths is not None:
        steps = torch.arange(size, device=query.device)
        parts.append(_hidden(steps < lengths.reshape(-1, 1, 1, 1), query.dtype))
    total: Any = sum(parts) if parts else None
    if total is None:
        return None
    return torch.broadcast_to(total, torch.broadcast_shapes(total.shape, (query.shape[2], size)))  # type: ignore[no-untyped-call]


def _hidden(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key may be seen, else minus infinity."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))


def _as_bias(mask: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """A mask of truths or of numbers as numbers; keys beyond its end are hidden."""
    bias = _hidden(mask, dtype) if mask.dtype == torch.bool else mask.to(dtype)
    return torch.nn.functional.pad(bias, (0, size - mask.shape[-1]), value=float("-inf"))


@operator("RotaryEmbedding")
def rotary_embedding(op: Op) -> Call:
    """Pairs of features turned by an angle for each place (Su et al. 2021, equation 34)."""
    width, heads = op.integer("rotary_embedding_dim", 0), op.integer("num_heads", 0)
    inputs = (op.arg(0), op.arg(1), op.arg(2), op.optional(3))
    return Call(rotated, (*inputs, heads, width, bool(op.integer("interleaved", 0))))


def rotated(
    x: Tensor, cosines: Tensor, sines: Tensor, places: Tensor | None, heads: int, width: int, interleaved: bool
) -> Tensor:
    """(batch, heads, places, features), or (batch, places, heads * features), with the first ``width`` turned.

    Args:
        x: what is turned.
        cosines: of the angles, (batch, places, width / 2), or a table that ``places`` index.
        sines: like ``cosines``.
        places: int64 (batch, places) or None.
        heads: number of heads where they lie side by side.
        width: features that are turned, all where 0.
        interleaved: whether neighbours are a pair, else the two halves are.
    """
    if places is not None:
        cosines, sines = cosines[places], sines[places]
    split = _split(x, heads) if x.ndim == 3 else x
    turning, rest = split[..., : width or None], split[..., width or split.shape[-1] :]
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    real, imaginary = cosines * first - sines * second, sines * first + cosines * second
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    result = torch.cat([turned, rest], -1)
    return result.transpose(1, 2).flatten(2) if x.ndim == 3 else result
