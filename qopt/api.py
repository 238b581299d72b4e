"""The Python interface: the same calls as the command line's, with the same words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qopt.cache import Cache
from qopt.certificates.certificate import Method
from qopt.config import Options, resolve_options
from qopt.data import Data, load_data
from qopt.errors import UsageError
from qopt.graph.formats import Format, identify
from qopt.graph.load import load_model
from qopt.graph.to_onnx import module_to_onnx
from qopt.job.analyze import AnalyzeTask, analyze_model
from qopt.job.attack import AttackTask, Source, attack_model
from qopt.job.attack_rows import Gradients
from qopt.job.bundle import Bundle
from qopt.job.certify import CertifyTask, certify_model
from qopt.job.command import reproduce
from qopt.job.compare import compare
from qopt.job.journal import NAME as JOURNAL
from qopt.job.journal import Journal, kept_plan
from qopt.job.optimize import Task, optimize_model
from qopt.job.preview import Preview
from qopt.job.preview import preview as preview_model
from qopt.job.sharing import Sharing, check_storage
from qopt.measure.network import Normalisation
from qopt.measure.presets import Preset
from qopt.plan import Plan, read_plan
from qopt.report.analysis_report import AnalysisReport
from qopt.report.attack_report import AttackReport
from qopt.report.certify_report import CertifyReport
from qopt.threat import Norm, parse_eps

__all__ = ["analyze", "attack", "certify", "compare", "load", "optimize", "preview"]


def optimize(
    model: str | Path | nn.Module,
    *,
    data: str | Path | Data | None = None,
    target: str = "int4",
    robust: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    example: tuple[Any, ...] | None = None,
    axes: Mapping[str, int] | None = None,
    emit: tuple[str, ...] = (),
    limits: tuple[str, ...] = (),
    gates: tuple[str, ...] | None = None,
    eps: float | str | None = None,
    plan: str | Path | Plan | None = None,
    storage: str | None = None,
    study: str | None = None,
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
        out: folder to write; None writes nothing. A search that measures plans keeps them there while it runs; Ctrl-C
            leaves them and the best plan so far.
        resume: go on from the plans that the same call, interrupted, left in ``out``: the result is that of a run
            without interruption. Where nothing was left the run begins anew.
        factory: ``package.module:name`` of the network that a state dict belongs to.
        trust: load formats that can run code.
        input_shape: shape of one image, such as (3, 32, 32); taken from ``data`` where the file does not tell.
        example: of a module that takes no images: the positional arguments of its forward(), such as token ids.
        axes: sizes to try a network with that is no classifier of images: name of a dynamic axis, or ``INPUT.AXIS``, to
            its size.
        emit: ``("c",)`` to write the network as C99 for microcontrollers too; needs data.
        limits: such as ``("bits<=3.5", "flash<=512KB")``.
        gates: such as ``("clean_drop<=1",)`` in points against float; None for the defaults.
        eps: radius of the threat model, pixels in [0, 1], as a number or like ``"8/255"``.
        plan: a plan, or the file of one, to apply instead of searching.
        storage: URL of a database, or ``journal:FILE``, by which ``qopt worker`` processes share what a search
            measures; the result is that of a run without.
        study: the name that they find the run by; None for one by its content, which ``progress`` is told.
        cache: folder that keeps expensive evaluations by content; None keeps nothing.
        progress: told the name of each step as it begins.
        **options: the other fields of `qopt.config.Options`.

    Returns:
        The bundle: emitted bytes, plan, report, manifest. ``bundle.exit_code`` is 0 where every gate holds, else 1.

    Raises:
        UsageError: a wrong option, path, plan or image shape, or resuming a run with other options (exit code 2).
        ModelError: a model that is corrupt, unsafe or not supported (exit code 3).
        VerificationError: an emitted file that does not compute what it must (exit code 4).
    """
    if resume and out is None:
        raise UsageError("nothing to resume from", where="resume", fix="give out, the folder of the interrupted run")
    if study is not None and storage is None:
        raise UsageError("a study is in a storage", where="--study", fix="give --storage too")
    if storage is not None:
        check_storage(storage, options.get("search", Options.search), planned=plan is not None)
    task, source = _task(
        model, data=data, target=target, robust=robust, factory=factory, trust=trust, input_shape=input_shape,
        example=example, axes=axes, emit=emit, limits=limits, gates=gates, eps=eps, plan=plan, **options,
    )  # fmt: skip
    sharing = None if storage is None else Sharing(storage, study, source)
    folder = None if out is None else Path(out)
    journal = Journal(None if folder is None else folder / JOURNAL, resume=resume)
    with kept_plan(journal, folder):
        bundle = optimize_model(task, _kept(cache), progress or _silent, journal, sharing)
    if folder is not None:
        bundle.write(folder)
        journal.discard()
    return bundle


def preview(
    model: str | Path | nn.Module,
    *,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Preview:
    """What `optimize` would do with the same arguments, without doing it: nothing is searched, attacked or written.

    Args:
        model: as of `optimize`; so are all others.
        out: the folder that would be written.
        cache: folder that keeps expensive evaluations by content.
        progress: told the name of each step as it begins.
        **options: the other arguments of `optimize`.

    Returns:
        Layers with their candidate formats, costs of uniform formats in bytes and on every machine of the target, what
        limits can be kept, and the time in seconds, a rough estimate from one timed pass.

    Raises:
        UsageError: a wrong option or path, or a target that takes none of the formats (exit code 2).
        ModelError: a model that is corrupt, unsafe or not supported (exit code 3).
    """
    task, _ = _task(model, **options)
    return preview_model(task, _kept(cache), progress or _silent, str(out or f"{task.name}.qopt"))


def _task(
    model: str | Path | nn.Module,
    *,
    data: str | Path | Data | None = None,
    target: str = "int4",
    robust: bool = False,
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    example: tuple[Any, ...] | None = None,
    axes: Mapping[str, int] | None = None,
    emit: tuple[str, ...] = (),
    limits: tuple[str, ...] = (),
    gates: tuple[str, ...] | None = None,
    eps: float | str | None = None,
    plan: str | Path | Plan | None = None,
    **options: Any,
) -> tuple[Task, dict[str, Any]]:
    """What `optimize` is called with, loaded, and where workers on other machines find it."""
    resolved = resolve_options(target=target, robust=robust, limits=limits, gates=gates, eps=eps, **options)
    chosen = read_plan(Path(plan)) if isinstance(plan, str | Path) else plan
    loaded = None if data is None else _loaded(data)
    shape = input_shape or (None if loaded is None else tuple(loaded.report.images.shape[1:]))
    file, facts = None if isinstance(model, nn.Module) else Path(model), dict[str, Any]()
    if isinstance(model, nn.Module):
        if shape is None and example is None:
            raise UsageError("a module is exported with an example", fix="give input_shape, example or data")
        graph, name = module_to_onnx(model, shape, example=example), type(model).__name__
    else:
        assert file is not None
        graph = load_model(file, factory=factory, trust=trust, input_shape=input_shape or _needed(file, shape))
        name, facts = file.stem, _source(file)
    where = str(data) if isinstance(data, str | Path) else None
    words = (
        *(("--model", factory) if factory else ()), *(("--trust",) if trust else ()),
        *(("--plan", str(plan)) if isinstance(plan, str | Path) else ()),
        *(("--input-shape", ",".join(map(str, input_shape))) if input_shape else ()),
        *(word for axis, size in (axes or {}).items() for word in ("--axis", f"{axis}={size}")),
        *(word for form in emit for word in ("--emit", form)),
    )  # fmt: skip
    command = reproduce(name if file is None else str(model), where, resolved, words)
    source = {
        "model": None if file is None else str(file), "data": where, "axes": dict(axes or {}),
        "input_shape": list(input_shape or (file and _needed(file, shape)) or ()), "factory": factory is not None,
        "trust": trust,
    }  # fmt: skip
    return Task(graph, name, loaded, resolved, chosen, facts, command, axes or {}, emit), source


def attack(
    model: str | Path,
    *,
    data: str | Path | Data,
    norm: Norm = "linf",
    eps: float | str | None = None,
    preset: str | Preset = "quick",
    images: int = 1000,
    sources: tuple[str | Path | Source, ...] = (),
    batch: int | None = None,
    seed: int = 0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    gradients: Gradients = "honest",
    save: str | Path | None = None,
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    threads: int = 1,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> AttackReport:
    """Attack a model file, float or quantized by anyone, and say what it withstands and whether that can be believed.

    Attacks by gradients are made on a twin of the file, attacks by queries on the file; all are judged by the file in
    ONNX Runtime. A file that the importer cannot rebuild is attacked by queries and transferred examples only.

    Args:
        model: a file as `optimize` takes it, and quantized ONNX files too.
        data: as of `optimize`; the images for the report are attacked, from the first on.
        norm: of the threat model, ``linf`` or ``l2``.
        eps: its radius, pixels in [0, 1], as a number or like ``"8/255"``; None for 8/255, or 0.1 for grey images.
        preset: ``quick``, ``papers``, ``standard``, or a suite of one's own.
        images: how many are attacked, at most.
        sources: model files whose examples are tried too, as ``FILE`` or ``FILE@EPS``.
        batch: images, or evaluations, per forward pass of every attack, which bounds the memory.
        seed: every random choice derives from it.
        mean: per-channel mean, where normalisation lies outside the network; ``std`` likewise.
        gradients: ``honest``, by straight-through estimation and BPDA, or ``plain``, through the rounding as it is:
            what a naive evaluation would have said.
        save: an ``.npz`` for the adversarial images: ``images``, ``labels``, and ``fooled_by``, the attack's name.
        factory: ``package.module:name`` of the network that a state dict belongs to, of sources too.
        trust: load formats that can run code.
        input_shape: shape of one image, where neither file nor data tell.
        threads: of ONNX Runtime.
        cache: folder that keeps every attack on every hundred images; an interrupted run goes on from there.
        progress: told the running robust accuracy, and the name of each step as it begins.

    Returns:
        The report; ``report.robust_accuracy`` is the one number, in percent, and ``report.exit_code`` is 1 where the
        gradients are masked, else 0.

    Raises:
        UsageError: a wrong option, path or preset, or images, labels or pixels that do not fit (exit code 2).
        ModelError: a model that is corrupt, unsafe, no classifier of images, or with logits that are not finite (3).
    """
    task = AttackTask(
        Path(model), _loaded(data), norm, _radius(eps), preset, images,
        tuple(source if isinstance(source, Source) else Source.parse(str(source)) for source in sources), batch, seed,
        Normalisation(mean, std), gradients, factory, trust, input_shape, threads,
        None if save is None else Path(save),
    )  # fmt: skip
    return attack_model(task, _kept(cache), progress or _silent)


def certify(
    model: str | Path,
    *,
    data: str | Path | Data,
    norm: Norm = "linf",
    eps: float | str | None = None,
    method: Method = "backward",
    images: int = 200,
    radius: bool = False,
    seed: int = 0,
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    threads: int = 1,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> CertifyReport:
    """Prove for each image of a model file that nothing in the ball changes its class; attack the images without proof.

    Args:
        model: a file as `attack` takes it, whose images are in [0, 1]: normalisation, if any, lies inside.
        data: as of `attack`.
        norm: of the threat model, ``linf`` or ``l2``.
        eps: its radius, pixels in [0, 1], as a number or like ``"1/255"``; None for 8/255, or 0.1 for grey images.
        method: the tightest bounds to try: ``interval``, ``backward-interval`` (CROWN-IBP) or ``backward`` (CROWN).
        images: how many are looked at, at most.
        radius: also bisect every image's certified radius up to ``eps``.
        seed: of the attack.
        factory: ``package.module:name`` of the network that a state dict belongs to.
        trust: load formats that can run code.
        input_shape: shape of one image, where the file does not tell.
        threads: of ONNX Runtime.
        cache: folder that keeps bounds by content; None keeps nothing.
        progress: told the name of each step as it begins.

    Returns:
        The report; ``report.certified_accuracy`` is the one number, in percent.

    Raises:
        UsageError: a wrong option or path, or images or labels that do not fit (exit code 2).
        ModelError: a model that cannot be loaded, classifies no images, or has an operator without bounds (3).
    """
    task = CertifyTask(
        Path(model), _loaded(data), norm, _radius(eps), method, images, radius, seed, factory, trust, input_shape,
        threads,
    )  # fmt: skip
    return certify_model(task, _kept(cache), progress or _silent)


def analyze(
    model: str | Path,
    *,
    data: str | Path | Data | None = None,
    norm: Norm = "linf",
    eps: float | str | None = None,
    target: str = "int4",
    formats: tuple[str, ...] = (),
    images: int = 128,
    seed: int = 0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> AnalysisReport:
    """The facts of every layer of a float model and of its candidate formats; with data, what predicts their harm.

    Args:
        model: a file as `optimize` takes it.
        data: as of `optimize`, of which train images are used; None for norms alone, which any network with weights
            has.
        norm: of the threat model, ``linf`` or ``l2``.
        eps: its radius, pixels in [0, 1], as a number or like ``"2/255"``; None for 8/255, or 0.1 for grey images.
        target: names of targets, whose candidate formats are looked at.
        formats: names of weight formats instead of those, such as ``("int3", "log4:tensor:max")``.
        images: clean images at most, and as many adversarial ones made from them on the float network.
        seed: of the attack.
        mean: per-channel mean, where normalisation lies outside the network; ``std`` likewise.
        factory: ``package.module:name`` of the network that a state dict belongs to.
        trust: load formats that can run code.
        input_shape: shape of one image, where neither file nor data tell.
        cache: folder that keeps norms, adversarial images and losses by content; None keeps nothing.
        progress: told the name of each step as it begins.

    Returns:
        The report: ``report.layers`` with their candidates, and ``report.correlations``.

    Raises:
        UsageError: a wrong option or path, or images or labels that do not fit (exit code 2).
        ModelError: a model that cannot be loaded, has no layer to quantize, or that no image runs through though
            there is data (3).
    """
    loaded = None if data is None else _loaded(data)
    shape = input_shape or (None if loaded is None else tuple(loaded.report.images.shape[1:]))
    task = AnalyzeTask(
        Path(model), loaded, norm, _radius(eps), target, formats, images, seed, mean,
        std, factory, trust, input_shape or _needed(Path(model), shape),
    )  # fmt: skip
    return analyze_model(task, _kept(cache), progress or _silent)


def load(
    path: str | Path, *, factory: str | None = None, trust: bool = False, input_shape: tuple[int, ...] | None = None
) -> Any:
    """A model file as an `onnx_ir.Model`, loaded as `optimize` loads it, with the same errors."""
    return load_model(Path(path), factory=factory, trust=trust, input_shape=input_shape)


def _loaded(data: str | Path | Data) -> Data:
    return data if isinstance(data, Data) else load_data(str(data))


def _radius(eps: float | str | None) -> float | None:
    return parse_eps(eps) if isinstance(eps, str) else eps


def _kept(cache: str | Path | None) -> Cache:
    return Cache(None if cache is None else Path(cache))


def _silent(step: str) -> None:
    del step


def _source(path: Path) -> dict[str, Any]:
    """Facts about the user's file; its size counts where it is a float ONNX file, which the emitted one replaces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = {"bytes": path.stat().st_size} if identify(path) is Format.ONNX else {}
    return {"file": path.name, "sha256": digest, **size}


def _needed(path: Path, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The images' shape where a module is exported; files that carry their own shape are held to it elsewhere."""
    return shape if identify(path) in (Format.STATE_DICT, Format.SAFETENSORS, Format.PICKLED_MODULE) else None
