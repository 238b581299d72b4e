"""Draw the report together from what the steps found out."""

from __future__ import annotations

from torch import Tensor

from qopt.emit import SATURATES, fused_layers, packed_layers, worst_pair_sums
from qopt.graph.model import Layer
from qopt.job.artefact import EmittedFile
from qopt.job.choose import Choice
from qopt.job.rows import Table
from qopt.job.run import PROBE_STEPS, Run
from qopt.lipschitz import NormBound
from qopt.report.model import (
    ActivationRow,
    DataFacts,
    Drop,
    GateRow,
    LayerRow,
    ModelFacts,
    Report,
    Row,
    SizeFacts,
)
from qopt.size import code_bits, stored_bits

AGREEMENT = 0.99
"""File and quantized graph must predict the same class on this share of images."""

FEW_IMAGES = 32
"""Fewer calibration images than this are worth a warning."""


def layer_metadata(choice: Choice) -> dict[str, dict[str, str]]:
    """Norms of every layer as properties of its nodes."""
    return {
        space.layer: {
            "qopt.norm_w": f"{space.norm.value:.6g}",
            "qopt.norm_wq": f"{choice.norms[space.layer][0].value:.6g}",
            "qopt.norm_dw": f"{choice.norms[space.layer][1].value:.6g}",
        }
        for space in choice.space.layers
        if space.layer in choice.norms
    }


def build_report(
    run: Run,
    choice: Choice,
    artefact: EmittedFile,
    table: Table | None,
    gates: list[GateRow],
    float_bytes: int,
    command: str,
) -> Report:
    """Everything but times."""
    rows = table.rows if table else []
    ours = next((row for row in rows if row.name == "qopt"), None)
    integers = fused_layers(run.prepared, choice.applied.quantized, run.options.dialect)
    stored = list(choice.applied.quantized.stored(run.prepared))
    found = worst_pair_sums(run.prepared, choice.applied.quantized)
    sums = {name: worst for name, worst in found.items() if name in integers}
    layers = [
        _layer_row(run, choice, layer, layer.name in integers, sums.get(layer.name)) for layer in run.prepared.layers
    ]
    size = SizeFacts(
        float_bytes=float_bytes, file_bytes=artefact.size, ratio=artefact.size / float_bytes,
        code_bits=code_bits(stored), stored_bits=stored_bits(stored),
    )  # fmt: skip
    return Report(
        verdict=_verdict(run, size, ours, gates, [row.limit for row in choice.limits if not row.holds]),
        robust_accuracy=ours.robust.value if ours and ours.robust else None,
        target=run.target.expansion,
        command=command,
        seed=run.options.seed,
        threat=str(run.threat) if run.options.robust else None,
        model=_model_facts(run),
        data=_data_facts(run),
        search=choice.facts,
        layers=layers,
        activations=_activation_rows(choice),
        size=size,
        kernels=artefact.kernels,
        rows=rows,
        sweep=table.sweep if table else [],
        amplification=table.amplification if table else None,
        transfers=table.transfers if table else None,
        masking=table.masking if table else [],
        gates=gates,
        limits=list(choice.limits),
        left_out=run.left_out,
        warnings=[
            *_warnings(run, choice, artefact, size),
            *_image_warnings(run, ours, gates),
            *_saturation_warnings(layers),
        ],
    )


def _model_facts(run: Run) -> ModelFacts:
    p = run.prepared
    return ModelFacts(
        name=run.name, digest=p.digest, input=p.input, input_shape=list(p.input_shape), classes=p.classes,
        batch=p.batch, layers=len(p.layers), weights=sum(layer.weights for layer in p.layers),
        notes=[*_interface(run), *p.notes, *run.weights.notes],
    )  # fmt: skip


def _interface(run: Run) -> list[str]:
    """What a network takes and gives that is no classifier of images."""
    if run.prepared.image:
        return []
    outputs = ", ".join(str(value.name) for value in run.prepared.model.graph.outputs)
    return [f"takes {', '.join(map(str, run.prepared.inputs))}; gives {outputs}"]


def _data_facts(run: Run) -> DataFacts | None:
    if run.data is None:
        return None
    data = run.data
    attacked = min(run.options.attack_images, len(data.report)) if run.options.robust else 0
    return DataFacts(
        digest=data.digest, calibrate=len(data.calibrate), select=len(data.select), report=len(data.report),
        attacked=attacked, notes=[*data.notes, *_calibration_note(run)],
    )  # fmt: skip


def _calibration_note(run: Run) -> list[str]:
    if run.options.calibrated_on == "clean":
        return []
    share = "all" if run.options.calibrated_on == "adversarial" else "every second one"
    return [f"calibration images: {share} adversarial, by PGD-{PROBE_STEPS} on the float network at {run.threat}"]


def _layer_row(run: Run, choice: Choice, layer: Layer, integer: bool, pair_sum: int | None) -> LayerRow:
    quantized = choice.applied.quantized
    spec = quantized.spec(layer.name)
    space = next(space for space in choice.space.layers if space.layer == layer.name)
    unchanged = (space.norm, NormBound(0.0, 0.0, "float"), NormBound(0.0, 0.0, "float"))
    norm, error, rows = choice.norms.get(layer.name, unchanged)
    return LayerRow(
        name=layer.name, op=layer.op, shape=list(layer.shape), format=str(spec), bits=spec.bits,
        container_bits=spec.container_bits, norm_w=space.norm.value,
        norm_wq=norm.value, norm_dw=error.value, row_norm_w=space.row_norm.value, row_norm_dw=rows.value,
        macs=layer.macs,
        integer=integer, reason=choice.applied.plan.reasons.get(layer.name, ""), worst_pair_sum=pair_sum,
    )  # fmt: skip


def _activation_rows(choice: Choice) -> list[ActivationRow]:
    plan, codes = choice.applied.plan, choice.applied.quantized.activations
    return [
        ActivationRow(
            tensor=name,
            format=f"int{codes[name].bits}",
            low=low,
            high=high,
            scale=codes[name].scale,
            zero_point=codes[name].zero_point,
        )
        for name, (low, high) in plan.ranges.items()
    ]


def _warnings(run: Run, choice: Choice, artefact: EmittedFile, size: SizeFacts) -> list[str]:
    warnings = [*run.warnings, *(run.data.notes if run.data else ())]
    kernels = artefact.kernels
    if kernels.agreement is not None and kernels.agreement < AGREEMENT:
        share = f"{100 * kernels.agreement:.2f} %"
        warnings.append(f"file and quantized graph agree on {share} of images only: the attacks see another network")
    integers = fused_layers(run.prepared, choice.applied.quantized, run.options.dialect)
    expected = sum(len(layer.uses) for layer in run.prepared.layers if layer.name in integers)
    if kernels.integer < expected:
        warnings.append(
            f"{expected} convolutions and matrix products are quantized on both sides, but ONNX Runtime fuses only "
            f"{kernels.integer} of them to integer kernels on this machine"
        )
    if size.ratio >= 1:
        warnings.append(
            f"the file is not smaller than the float one ({size.file_bytes} against {size.float_bytes} bytes): "
            "quantize more layers, or keep a network that small in float"
        )
    warnings += [*_calibration_warnings(run, choice), *_channel_warnings(run, choice)]
    warnings += _dialect_warnings(run, choice, integers)
    return warnings + [
        f"the plan does not keep the limit {row.limit}: {row.found} ({row.machine})"
        for row in choice.limits
        if not row.holds
    ]


def _image_warnings(run: Run, ours: Row | None, gates: list[GateRow]) -> list[str]:
    """Gates that only more images could decide, and a network that takes its images one by one."""
    warnings = []
    drops = {} if ours is None else {"clean_drop": ours.clean_drop, "robust_drop": ours.robust_drop}
    missed = {gate.gate for gate in gates if not gate.holds}
    for gate in run.options.active_gates:
        drop = drops.get(gate.name)
        if str(gate) in missed and drop is not None and gate.bound is not None and drop.value <= gate.bound:
            warnings.append(
                f"gate {gate}: the drop found is within it, but {drop.n} images cannot tell it from {drop.high:.1f} "
                "points with 95 % confidence; give more of them"
            )
    if run.data is not None and run.prepared.batch == 1:
        warnings.append(
            "the network takes one image at a time, which makes attacks slow: export it with a free batch axis"
        )
    return warnings


def _saturation_warnings(layers: list[LayerRow]) -> list[str]:
    """The layers whose products x86 processors without VNNI may saturate."""
    over = [row for row in layers if row.worst_pair_sum is not None and row.worst_pair_sum > SATURATES]
    if not over:
        return []
    worst = max(row.worst_pair_sum or 0 for row in over)
    return [
        f"two neighbouring products may sum to {worst}, which x86 processors without VNNI silently saturate at "
        f"{SATURATES}, in {', '.join(row.name for row in over)}: give these layers 7 bits or fewer, or set the session "
        "option session.x64quantprecision to 1 there"
    ]


def _dialect_warnings(run: Run, choice: Choice, integers: frozenset[str]) -> list[str]:
    """What a session of plain QDQ must be told, and which layers take float memory all the same."""
    weights = choice.applied.quantized.weights
    if run.options.memory:
        left = set(weights) - integers - packed_layers(run.prepared, choice.applied.quantized)
        names = ", ".join(layer.name for layer in run.prepared.layers if layer.name in left)
        return (
            [
                f"unpacked to float at load, whatever --memory asks: {names}; only matrix products of 4 bits or fewer, "
                "per channel or in blocks of 16, 32, 64, 128 or 256, stay packed"
            ]
            if left
            else []
        )
    products = [
        x.name for x in run.prepared.layers if x.op == "MatMul" and x.name in weights and x.name not in integers
    ]
    if run.options.dialect == "folding" or not products:
        return []
    return [
        "by default ONNX Runtime quantizes the activations of DequantizeLinear + MatMul to 8 bits unasked: set the "
        f"session option session.qdq_matmulnbits_accuracy_level to 1, for {', '.join(products)}"
    ]


def _calibration_warnings(run: Run, choice: Choice) -> list[str]:
    """Too few images for what was calibrated on them, and tensors that hold one value only."""
    found = []
    plan, given = choice.applied.plan, {} if run.plan is None else run.plan.ranges
    observed = {name: bounds for name, bounds in plan.ranges.items() if name not in given}
    if run.data is not None and (observed or plan.bias_correction or plan.rounding != "nearest"):
        count = min(run.options.calibration_images, len(run.data.calibrate))
        if count < FEW_IMAGES:
            found.append(
                f"calibrated on {count} images only: ranges and biases may not fit others; give {FEW_IMAGES} or more"
            )
    return found + [
        f"activation {name} is constant ({low:g}) on the calibration images: look at the layers before it, or give "
        "other images"
        for name, (low, high) in observed.items()
        if low == high
    ]


def _channel_warnings(run: Run, choice: Choice) -> list[str]:
    """Layers with output channels whose weights are all zero, in the model or by its quantization."""
    found = []
    for layer in run.prepared.layers:
        dead = _zero_channels(run.weights.weight(layer), layer)
        if dead.any() and layer.op != "Gather":  # a row of zeros stands for no token
            found.append(
                f"layer {layer.name}: {int(dead.sum())} of {layer.channels} output channels are constant, their "
                "weights are all zero; remove them from the model"
            )
        code = choice.applied.quantized.weights.get(layer.name)
        if code is not None and (lost := _zero_channels(code.dequantize(), layer) & ~dead).any():
            found.append(
                f"layer {layer.name}: {int(lost.sum())} of {layer.channels} output channels became constant, "
                f"{code.spec} rounds all their weights to zero; give the layer more bits or a scale per channel"
            )
    return found


def _zero_channels(weight: Tensor, layer: Layer) -> Tensor:
    """Which output channels have no weight but zeros: bool (channels,)."""
    return (weight == 0).movedim(layer.channel_axis, 0).flatten(1).all(1)


def _verdict(run: Run, size: SizeFacts, ours: Row | None, gates: list[GateRow], broken: list[str]) -> str:
    text = f"{run.name} in {size.code_bits:.2f} bits per weight, {size.ratio:.3f} of the float file"
    if ours is None:
        text += f"; {run.unattacked or 'nothing measured on images'}"
        return f"{text}{_broken(broken)}."
    assert ours.clean_drop is not None
    text += f": clean accuracy {ours.clean.value:.1f} % ({_change(ours.clean_drop)} points against float)"
    if ours.robust is not None and ours.robust_drop is not None:
        text += f", robust accuracy {ours.robust.value:.1f} % ({_change(ours.robust_drop)}) at {run.threat}"
        text += ", gradients masked" if ours.masking == "masked" else ""
    failed = [gate.gate for gate in gates if not gate.holds]
    if not gates:
        return f"{text}{_broken(broken)}."
    text += "; " + (f"gates fail: {', '.join(failed)}" if failed else "every gate holds")
    return f"{text}{_broken(broken)}."


def _change(drop: Drop) -> str:
    """The drop with its sign turned, and no sign before a zero but ``+``."""
    return f"{round(-drop.value, 1) + 0.0:+.1f}"


def _broken(limits: list[str]) -> str:
    return f"; limits broken: {', '.join(dict.fromkeys(limits))}" if limits else ""
