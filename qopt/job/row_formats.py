"""What every format does to every row of every layer, rounded by GPTQ: the costs of formats per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qopt.graph.model import Layer
from qopt.job.probes import BATCH, input_moments, probe_images
from qopt.job.run import Run
from qopt.job.space import price, takes_rows
from qopt.measure.fisher import Change, channel_divergences
from qopt.passes.watcher import taped_bytes
from qopt.quant import QuantizedRows, QuantizedWeight
from qopt.quant.gptq import as_rows, as_stored, gptq
from qopt.quantize import whole_batches
from qopt.search.rows import RowChoices, row_capable
from qopt.spec import WeightSpec

SMALLEST = 1 << 14
"""Weights of the smallest layer whose rows may differ: every format more adds some 500 bytes of nodes to the file."""

ROW_MACS = 2 * 10**12
"""Multiplications of all layers in all formats, about a minute on two cores; fewer images, but `LEAST_IMAGES`, where
more."""

LEAST_IMAGES = 32
"""A gradient of each of its two random signs tells something of every class."""

TAPED_BYTES = 1 << 29
"""Activations that one gradient may pass at a time; fewer images per run where they are more."""


def row_choices(run: Run, formats: Mapping[str, Sequence[WeightSpec]]) -> dict[str, RowChoices]:
    """Layer to the formats among ``formats`` that its rows can have; layers whose inputs have no moment are absent, and
    so are those whose rows have no choice.

    The codes are those that GPTQ finds on the inputs of the float network, each under its mean-square scale: close to
    what the plan will get, where rounding to nearest would overrate the errors of few bits several times.
    """
    layers = {layer.name: layer for layer in run.prepared.layers}
    specs = {name: kept for name in layers if len(kept := row_formats(formats[name])) > 1}
    if not specs:
        return {}
    run.progress("divergence of every row and format")
    moments = input_moments(run, centred=True)
    specs = {name: kept for name, kept in specs.items() if name in moments}
    changes = {
        name: Change(layers[name].channel_axis, _errors(run, layers[name], kept, moments[name]))
        for name, kept in specs.items()
    }  # fmt: skip
    graph, inputs = run.quantizer.float_graph, _inputs(run, specs)
    fit = TAPED_BYTES // max(taped_bytes(graph, inputs[: run.prepared.batch or 1]), 1)
    batch = run.prepared.batch or max(min(BATCH, fit), 1)
    found = channel_divergences(graph, inputs, changes, batch_size=batch, seed=run.seed("rows"))
    return {
        name: RowChoices(
            specs[name], _costs(run, layers[name], specs[name]), values.numpy(),
            layers[name].weights < SMALLEST or not takes_rows(run, layers[name], specs[name]),
        )
        for name, values in found.items()
    }  # fmt: skip


def row_formats(formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
    """Those that are worth a part of their own: of each width and quantizer the one of least squared error."""
    kept = [spec for spec in formats if row_capable(spec)]
    return tuple(s for s in kept if not (s.scale == "max" and replace(s, scale="mse") in kept))


def _costs(run: Run, layer: Layer, specs: Sequence[WeightSpec]) -> dict[str, NDArray[np.float64]]:
    prices = [price(run, run.network.layer(layer.name), spec) for spec in specs]
    return {column: np.array([one[column] for one in prices]) / layer.channels for column in prices[0]}


def _errors(run: Run, layer: Layer, specs: Sequence[WeightSpec], moment: Tensor) -> Tensor:
    """``W_q - W`` in every format, (formats, *weight): one run of GPTQ over copies of every row, one in each format."""
    weight = run.quantizer.weight(layer)
    rows = as_rows(weight, layer.channel_axis, layer.groups)
    copies = rows[:, None].expand(-1, len(specs), -1, -1).flatten(0, 2)
    wanted = [spec for _ in range(layer.groups) for spec in specs for _ in range(rows.shape[1])]
    like = _in_rows(run, layer, WeightSpec.of_rows(wanted))
    found = gptq(copies, like, moment, scale_search=False).dequantize() - copies
    by_format = found.reshape(layer.groups, len(specs), *rows.shape[1:]).transpose(0, 1)
    return torch.stack([as_stored(one, weight.shape, layer.channel_axis) for one in by_format])


def _in_rows(run: Run, layer: Layer, spec: WeightSpec) -> QuantizedRows:
    """The nearest codes of the layer in every format of ``spec``, as one weight of all their rows."""
    parts = []
    for row, members in spec.row_members.items():
        codes = run.quantizer.quantized_weight(layer, row)
        assert isinstance(codes, QuantizedWeight)
        parts.append((replace(codes, codes=as_rows(codes.codes, codes.axis, 1)[0], axis=0), torch.tensor(members)))
    return QuantizedRows(spec, tuple(part for part, _ in parts), tuple(members for _, members in parts), 0)


def _inputs(run: Run, formats: Mapping[str, Sequence[WeightSpec]]) -> Tensor:
    """Clean images and as many adversarial ones, as many as a large network affords."""
    macs = sum(layer.macs * len(formats.get(layer.name, ())) for layer in run.prepared.layers)
    most = max(ROW_MACS // max(macs, 1), LEAST_IMAGES)
    clean, adversarial = probe_images(run, "calibrate")
    images = (
        clean[:most] if adversarial is None else torch.cat([part[: -(-most // 2)] for part in (clean, adversarial)])
    )
    return whole_batches(run.normalisation(images), run.prepared.batch)
