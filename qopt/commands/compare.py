"""`qopt compare`: several networks attacked side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qopt.commands.running import cache_folder, check_folder, numbers, working

ATTACK = "fgsm, bim, pgd, cw or spsa; repeatable. [all but pgd]"


EXAMPLES = """
Examples:

    qopt compare float.onnx int8.onnx int4.onnx --data images.npz -o report

    qopt compare float.onnx int8.onnx --data images.npz --attack pgd --attack cw --images 200
"""


def compare(
    models: Annotated[list[Path], typer.Argument(help="Two or more model files, the float one first.")],
    data: Annotated[str, typer.Option(help="Images: a .npz file, a folder of class folders, or module:factory.")],
    attack: Annotated[list[str] | None, typer.Option(help=ATTACK)] = None,
    norm: Annotated[str, typer.Option(help="Norm of the threat model: linf or l2.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Its radius, such as 0.1 or 8/255. [by channels]")] = None,
    images: Annotated[int, typer.Option(help="Test images, at most.")] = 100,
    steps: Annotated[int, typer.Option(help="Steps of the iterated attacks.")] = 40,
    kappa: Annotated[str, typer.Option(help="Leads in logits to try with cw: the best transfer counts.")] = "5,15",
    mean: Annotated[str, typer.Option(help="Per-channel mean, where normalisation lies outside.")] = "",
    std: Annotated[str, typer.Option(help="Per-channel standard deviation.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the report with heat maps.")] = None,
    seed: Annotated[int, typer.Option(help="Every random choice derives from it.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]", min=1)] = None,
    cache: Annotated[bool, typer.Option(help="Keep examples by content.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Attack every one of MODELS and let all of them judge the examples: transfers, agreement, shifts, ensemble.

    Networks quantized by anyone, of the same images and classes; accuracies are those of the files in ONNX Runtime.
    """
    del debug  # read by main, which must know it even when parsing fails
    if out is not None:
        check_folder(out)
    options: dict[str, Any] = {
        "norm": norm, "eps": eps, "images": images, "steps": steps, "kappas": numbers(kappa, "--kappa"),
        "mean": numbers(mean, "--mean"), "std": numbers(std, "--std"), "seed": seed, "out": out,
        "cache": cache_folder() if cache else None, **({"attacks": tuple(attack)} if attack else {}),
    }  # fmt: skip
    found, shown = _run(models, data, threads, quiet, options)
    typer.echo(found.to_json() if as_json else shown, nl=False)
    if out is not None and not as_json:
        typer.echo(f"\nreport  {out / 'compare.html'}")


def _run(models: list[Path], data: str, threads: int | None, quiet: bool, options: dict[str, Any]) -> Any:
    """The comparison, and its tables for a terminal; progress goes to stderr."""
    with working(quiet, threads) as progress:
        import torch

        from qopt.job.compare import compare as compare_files
        from qopt.report.comparison_views import text

        found = compare_files(
            models, data=data, threads=threads or torch.get_num_threads(), progress=progress, **options
        )
        return found, text(found)
