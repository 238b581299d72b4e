"""`qopt certify`: what is proved of one model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qopt.commands.running import cache_folder, image_shape, working

EXAMPLES = """
Examples:

    qopt certify out/model.onnx --data images.npz --eps 0.05

    qopt certify model.onnx --data images.npz --eps 1/255 --method backward-interval --radius --json
"""


def certify(
    model: Annotated[Path, typer.Argument(help="A model file, float or quantized by anyone.", metavar="MODEL")],
    data: Annotated[str, typer.Option(help="Images: a .npz file, a folder of class folders, or module:factory.")],
    norm: Annotated[str, typer.Option(help="Norm of the threat model: linf or l2.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Its radius, such as 0.05 or 1/255. [by channels]")] = None,
    method: Annotated[
        str, typer.Option(help="The tightest bounds to try: interval, backward-interval or backward.")
    ] = "backward",
    images: Annotated[int, typer.Option(help="Images that are looked at, at most.")] = 200,
    radius: Annotated[bool, typer.Option("--radius", help="Bisect every image's certified radius, too.")] = False,
    factory: Annotated[str | None, typer.Option("--model", help="package.module:factory of a state dict.")] = None,
    input_shape: Annotated[str, typer.Option(help="Shape of one image, such as 3,32,32.")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    seed: Annotated[int, typer.Option(help="Of the attack that is shown beside.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    cache: Annotated[bool, typer.Option(help="Keep bounds by the content of the file and the images.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Prove for each image that nothing in the ball changes its class, and attack the images without a proof.

    The network takes images in [0, 1]: normalisation must lie inside it. Exit code 0; 2 where an option or the data are
    wrong, 3 where the model cannot be used or bounded.
    """
    del debug  # read by main, which must know it even when parsing fails
    from qopt.threat import ThreatModel, parse_eps

    radius_of_ball = None if eps is None else parse_eps(eps)
    ThreatModel(norm)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "norm": norm, "eps": radius_of_ball, "method": method, "images": images, "radius": radius, "factory": factory,
        "input_shape": image_shape(input_shape), "trust": trust, "seed": seed,
    }  # fmt: skip
    report = _run(model, data, quiet, threads, cache, options)
    from qopt.report.certify_report import show_certificates

    typer.echo(report.to_json() if as_json else show_certificates(report), nl=False)


def _run(model: Path, data: str, quiet: bool, threads: int | None, cache: bool, options: dict[str, Any]) -> Any:
    with working(quiet, threads) as progress:
        import torch

        from qopt.api import certify as certify_file

        kept = cache_folder() if cache else None
        return certify_file(model, data=data, threads=torch.get_num_threads(), cache=kept, progress=progress, **options)
