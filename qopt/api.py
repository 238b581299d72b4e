"""The Python interface: the same calls as the command line's, with the same words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data, load_data
from qopt.errors import UsageError
from qopt.graph.formats import Format, identify
from qopt.graph.load import load_model
from qopt.graph.to_onnx import module_to_onnx
from qopt.job.bundle import Bundle
from qopt.job.optimize import optimize_model
from qopt.limits import parse_gate, parse_limit
from qopt.threat import parse_eps


def optimize(
    model: str | Path | nn.Module,
    *,
    data: str | Path | Data | None = None,
    target: str = "int4",
    robust: bool = False,
    out: str | Path | None = None,
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    limits: tuple[str, ...] = (),
    gates: tuple[str, ...] | None = None,
    eps: float | str | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Bundle:
    """Compile a float network into a low-bit one, and attack what is emitted before calling it done.

    Args:
        model: a file (`torch.export` archive, state dict with ``factory``, safetensors with ``factory``, ONNX), or a
            module, which is exported in eval mode with a dynamic batch.
        data: ``.npz``, folder of class folders, ``package.module:factory``, or `Data`; None searches by norms alone
            and leaves activations float.
        target: names of targets, joined by commas; their candidates intersect, their limits join.
        robust: thresholds filter, sensitivities are measured on adversarial examples, the attacks run and the gates
            ``clean_drop<=2``, ``robust_drop<=2`` and ``masking=none`` apply.
        out: folder to write; None writes nothing.
        factory: ``package.module:name`` of the network that a state dict belongs to.
        trust: load formats that can run code.
        input_shape: shape of one image, such as (3, 32, 32); taken from ``data`` where the file does not tell.
        limits: such as ``("bits<=3.5", "flash<=512KB")``.
        gates: such as ``("clean_drop<=1",)`` in points against float; None for the defaults.
        eps: radius of the threat model, pixels in [0, 1], as a number or like ``"8/255"``.
        cache: folder that keeps expensive evaluations by content; None keeps nothing.
        progress: told the name of each step as it begins.
        **options: the other fields of `qopt.config.Options`.

    Returns:
        The bundle: emitted bytes, plan, report, manifest. ``bundle.exit_code`` is 0 where every gate holds, else 1.

    Raises:
        UsageError: a wrong option, path, plan or image shape (exit code 2).
        ModelError: a model that is corrupt, unsafe or not supported (exit code 3).
        VerificationError: an emitted file that does not compute what it must (exit code 4).
    """
    resolved = resolve_options(target=target, robust=robust, limits=limits, gates=gates, eps=eps, **options)
    loaded = load_data(str(data)) if isinstance(data, str | Path) else data
    shape = input_shape or (None if loaded is None else tuple(loaded.report.images.shape[1:]))
    if isinstance(model, nn.Module):
        if shape is None:
            raise UsageError("a module is exported with an example", fix="give input_shape or data")
        graph, name, size = module_to_onnx(model, shape), type(model).__name__, 0
    else:
        path = Path(model)
        graph = load_model(path, factory=factory, trust=trust, input_shape=input_shape or _needed(path, shape))
        name, size = path.stem, path.stat().st_size if identify(path) is Format.ONNX else 0
    store = Cache(Path(cache) if cache is not None else None)
    bundle = optimize_model(graph, name, loaded, resolved, store, progress or (lambda step: None), size)
    if out is not None:
        bundle.write(out)
    return bundle


def resolve_options(
    *,
    limits: tuple[str, ...] = (),
    gates: tuple[str, ...] | None = None,
    eps: float | str | None = None,
    **fields: Any,
) -> Options:
    """Options from what users write; raises UsageError for an unknown field or a value that does not parse."""
    known = Options.__dataclass_fields__
    for name in fields:
        if name not in known:
            from qopt.errors import nearest

            raise UsageError("unknown option", got=repr(name), fix=nearest(name, known))
    options = Options(**fields)
    return replace(
        options,
        limits=tuple(parse_limit(text) for text in limits),
        gates=None if gates is None else tuple(parse_gate(text) for text in gates),
        eps=parse_eps(eps) if isinstance(eps, str) else eps,
    )


def load(
    path: str | Path, *, factory: str | None = None, trust: bool = False, input_shape: tuple[int, ...] | None = None
) -> Any:
    """A model file as an `onnx_ir.Model`, loaded as `optimize` loads it, with the same errors."""
    return load_model(Path(path), factory=factory, trust=trust, input_shape=input_shape)


def _needed(path: Path, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The images' shape where a module is exported; files that carry their own shape are held to it elsewhere."""
    return shape if identify(path) in (Format.STATE_DICT, Format.SAFETENSORS, Format.PICKLED_MODULE) else None
