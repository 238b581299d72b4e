"""`qopt attack`: what one model file withstands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qopt.commands.running import cache_folder, image_shape, numbers, working

EXAMPLES = """
Examples:

    qopt attack out/model.onnx --data images.npz --eps 8/255

    qopt attack quantized.onnx --data images.npz --preset standard --images 200 --source float.onnx --json

    qopt attack vendor.onnx --data images.npz --source other.onnx@16/255 --save adversarial.npz
"""


def attack(
    model: Annotated[Path, typer.Argument(help="A model file, float or quantized by anyone.", metavar="MODEL")],
    data: Annotated[str, typer.Option(help="Images: a .npz file, a folder of class folders, or module:factory.")],
    norm: Annotated[str, typer.Option(help="Norm of the threat model: linf or l2.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Its radius, such as 0.1 or 8/255. [by channels]")] = None,
    preset: Annotated[
        str, typer.Option(help="quick (seconds to minutes), papers (hours on 1000 images) or standard (AutoAttack).")
    ] = "quick",
    images: Annotated[int, typer.Option(help="Images that are attacked, at most.")] = 1000,
    source: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE@EPS: a model whose examples are tried too; repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per forward pass, to bound the memory.")] = None,
    gradients: Annotated[
        str, typer.Option(help="honest (STE and BPDA), or plain (what a naive evaluation would say).")
    ] = "honest",
    mean: Annotated[str, typer.Option(help="Per-channel mean, where normalisation lies outside the network.")] = "",
    std: Annotated[str, typer.Option(help="Per-channel standard deviation.")] = "",
    save: Annotated[Path | None, typer.Option(help="Write the adversarial images to this .npz file.")] = None,
    factory: Annotated[str | None, typer.Option("--model", help="package.module:factory of a state dict.")] = None,
    input_shape: Annotated[str, typer.Option(help="Shape of one image, such as 3,32,32. [from --data]")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    seed: Annotated[int, typer.Option(help="Every random choice derives from it.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    cache: Annotated[bool, typer.Option(help="Keep what is done, so that an interrupted run goes on.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Attack MODEL, and say what it withstands and whether its gradients are masked.

    Exit code 0, or 1 where they are masked; 2 where an option or the data are wrong, 3 where the model cannot be used.
    """
    del debug  # read by main, which must know it even when parsing fails
    options: dict[str, Any] = {
        "norm": norm, "eps": eps, "preset": preset, "images": images, "sources": tuple(source or ()), "batch": batch,
        "gradients": gradients, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std"), "save": save,
        "factory": factory, "input_shape": image_shape(input_shape), "trust": trust, "seed": seed,
        "cache": cache_folder() if cache else None,
    }  # fmt: skip
    _check(norm, eps, save)
    report = _run(model, data, quiet, threads, options, kept=cache)
    from qopt.report.attack_report import show_attack

    typer.echo(report.to_json() if as_json else show_attack(report), nl=False)
    raise typer.Exit(report.exit_code)


def _check(norm: str, eps: str | None, save: Path | None) -> None:
    """Refuse wrong words at once, before the seconds that importing torch takes."""
    from qopt.threat import ThreatModel, parse_eps

    if eps is not None:
        parse_eps(eps)
    ThreatModel(norm)  # type: ignore[arg-type]
    if save is not None:
        from qopt.job.attack_examples import check_place

        check_place(save)


def _run(model: Path, data: str, quiet: bool, threads: int | None, options: dict[str, Any], *, kept: bool) -> Any:
    fix = "the same command goes on where it stopped" if kept else None
    with working(quiet, threads, fix) as progress:
        import torch

        from qopt.api import attack as attack_file

        return attack_file(model, data=data, threads=torch.get_num_threads(), progress=progress, **options)
