"""`qopt analyze`: norms, ranges and the measured harm of every layer and format of a float model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qopt.commands.running import cache_folder, image_shape, numbers, working
from qopt.errors import UsageError

EXAMPLES = """
Examples:

    qopt analyze model.onnx

    qopt analyze model.onnx --data images.npz --eps 2/255 --candidates

    qopt analyze model.onnx --data images.npz --formats int2,int3,int4:tensor:max --images 256 --json
"""


def analyze(
    model: Annotated[Path, typer.Argument(help="A float model file of any kind that `qopt optimize` takes.")],
    data: Annotated[
        str | None, typer.Option(help="Images: a .npz file, a folder of class folders, or module:factory.")
    ] = None,
    norm: Annotated[str, typer.Option(help="Norm of the threat model: linf or l2.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Its radius, such as 0.1 or 2/255. [by channels]")] = None,
    target: Annotated[str, typer.Option(help="Whose candidate formats are looked at.")] = "int4",
    formats: Annotated[str, typer.Option(help="Formats instead, joined by commas: int4,log4:max.")] = "",
    images: Annotated[int, typer.Option(help="Images, at most, and as many adversarial ones made from them.")] = 128,
    candidates: Annotated[bool, typer.Option("--candidates", help="Show all facts of every candidate.")] = False,
    factory: Annotated[str | None, typer.Option("--model", help="package.module:factory of a state dict.")] = None,
    input_shape: Annotated[str, typer.Option(help="Shape of one image, such as 3,32,32.")] = "",
    mean: Annotated[str, typer.Option(help="Per-channel mean, where normalisation lies outside the network.")] = "",
    std: Annotated[str, typer.Option(help="Per-channel standard deviation, likewise.")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    seed: Annotated[int, typer.Option(help="Of the attack that makes the adversarial images.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    cache: Annotated[bool, typer.Option(help="Keep norms, adversarial images and losses by content.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, all of it, as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Say of every layer how large it is, what it can amplify, and what each format would do to it.

    Without data the norms of W, of W rounded and of the error. With data also the ranges and the error amplification
    of activations, the loss with one layer quantized at a time, and how well the thresholds predict it; train images
    only. Exit code 0; 2 where an option or the data are wrong, 3 where the model cannot be used.
    """
    del debug  # read by main, which must know it even when parsing fails
    from qopt.job.analysis_formats import analysed_formats
    from qopt.threat import ThreatModel, parse_eps

    radius = None if eps is None else parse_eps(eps)
    ThreatModel(norm)  # type: ignore[arg-type]
    if images < 1:
        raise UsageError("must be at least 1", where="--images", got=str(images))
    names = tuple(word for word in formats.split(",") if word.strip())
    analysed_formats(target, names)
    options: dict[str, Any] = {
        "norm": norm, "eps": radius, "target": target, "images": images, "seed": seed, "factory": factory,
        "formats": names, "trust": trust, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std"),
        "input_shape": image_shape(input_shape),
    }  # fmt: skip
    report = _run(model, data, quiet, threads, cache, options)
    from qopt.report.analysis_report import show_analysis

    typer.echo(report.to_json() if as_json else show_analysis(report, candidates=candidates), nl=False)


def _run(model: Path, data: str | None, quiet: bool, threads: int | None, cache: bool, options: dict[str, Any]) -> Any:
    with working(quiet, threads) as progress:
        from qopt.api import analyze as analyze_file

        kept = cache_folder() if cache else None
        return analyze_file(model, data=data, cache=kept, progress=progress, **options)
