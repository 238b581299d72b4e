"""`qopt optimize`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qopt.commands.running import (
    cache_folder,
    check_folder,
    check_options,
    finish,
    image_shape,
    numbers,
    run_job,
    run_preview,
    sizes,
    where_time_went,
)
from qopt.commands.settings import described

MODEL = "A torch.export archive, a state dict or safetensors file with --model, or an ONNX file."
DATA = "Images: a .npz file, a folder of class folders, or package.module:factory."
EXAMPLES = """
Examples:

    qopt optimize model.onnx --target int4

    qopt optimize model.pt --target int4 --robust --data images.npz --eps 8/255 -o out

    qopt optimize weights.pt --model package.module:factory --input-shape 3,32,32 --limit "bits<=3.5"
"""


def optimize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=MODEL, metavar="MODEL")],
    target: Annotated[str, typer.Option(help="Targets, joined by commas: int8, int4, int4-uniform, int2.")] = "int4",
    robust: Annotated[
        bool, typer.Option("--robust", help="Attack the file; thresholds and robust gates apply.")
    ] = False,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    norm: Annotated[str, typer.Option(help="Norm of the threat model: linf or l2.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Its radius, such as 0.1 or 8/255. [by channels]")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder. [MODEL's name + .qopt]")] = None,
    limit: Annotated[list[str] | None, typer.Option(help='Limit on the plan, such as "bits<=3.5"; repeatable.')] = None,
    gate: Annotated[list[str] | None, typer.Option(help='Condition on the file, such as "clean_drop<=2".')] = None,
    search: Annotated[
        str, typer.Option(help="Strategy: greedy, exact, refit, optuna, quanos, lipschitz, uniform.")
    ] = "greedy",
    sensitivity: Annotated[
        str,
        typer.Option(help="Summed over layers: auto, error, weighted, noise, divergence, clean-divergence."),
    ] = "auto",
    thresholds: Annotated[str, typer.Option(help="Form: auto, paper, relative, weighted, none.")] = "auto",
    threshold: Annotated[float, typer.Option(help="Bound of relative and weighted thresholds.")] = 0.25,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to apply instead of searching.")] = None,
    activations: Annotated[
        str | None, typer.Option(help="Activation format, or several: int8,int6,int4:mse. [target's]")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Uniform plan to compare, WEIGHTS[@ACTIVATIONS]. [int4:max]")
    ] = None,
    rounding: Annotated[str, typer.Option(help="auto (measured), nearest, gptq or adaround.")] = "auto",
    bias_correction: Annotated[str, typer.Option(help="auto (measured), on or off.")] = "auto",
    equalisation: Annotated[
        str, typer.Option(help="Even out channels between layers first: auto (measured at max), on or off.")
    ] = "auto",
    rows: Annotated[str, typer.Option(help="Formats per output channel: auto (measured), on or off.")] = "auto",
    effort: Annotated[str, typer.Option(help="How much auto tries: fast, normal or max.")] = "normal",
    mean: Annotated[str, typer.Option(help="Per-channel mean, where normalisation lies outside.")] = "",
    std: Annotated[str, typer.Option(help="Per-channel standard deviation.")] = "",
    factory: Annotated[str | None, typer.Option("--model", help="package.module:factory of a state dict.")] = None,
    input_shape: Annotated[str, typer.Option(help="Shape of one image, such as 3,32,32. [from --data]")] = "",
    axis: Annotated[
        list[str] | None, typer.Option(help="NAME=SIZE of a dynamic axis to try a network with that takes no images.")
    ] = None,
    dialect: Annotated[
        str, typer.Option(help="Weights in the file: folding (fewest bytes) or qdq (plain, for other compilers).")
    ] = "folding",
    memory: Annotated[
        bool, typer.Option("--memory", help="Keep weights of float matrix products packed at run time (MatMulNBits).")
    ] = False,
    emit: Annotated[list[str] | None, typer.Option(help="Write c (C99 for microcontrollers) beside onnx.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    calibration: Annotated[
        str, typer.Option(help="Calibrate on clean, adversarial or mixed images. [mixed if robust]")
    ] = "auto",
    calibration_images: Annotated[int, typer.Option(help="Images that ranges are observed on, at most.")] = 1024,
    probe_images: Annotated[int, typer.Option(help="Images that plans are compared on, at most.")] = 256,
    attack_images: Annotated[int, typer.Option(help="Report images that are attacked, at most.")] = 1000,
    evaluations: Annotated[int, typer.Option(help="Plans that refit and optuna measure, at most.")] = 24,
    seed: Annotated[int, typer.Option(help="Every random choice derives from it.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the plans that an interrupted run left in the output folder.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="URL of a database, to share what refit and optuna measure with `qopt worker`."),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name for it in the storage. [by content]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    cache: Annotated[bool, typer.Option(help="Keep expensive evaluations by content.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the options, with where each is from, and end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and about how long; write nothing.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Where the time went, on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Compile MODEL into a low-bit ONNX file, measure it and attack it."""
    del debug  # read by main, which must know it even when parsing fails
    folder = out or Path(f"{Path(model).stem}.qopt")
    check_folder(folder)
    options: dict[str, Any] = {
        "target": target, "robust": robust, "norm": norm, "eps": eps, "limits": tuple(limit or ()),
        "gates": tuple(gate) if gate else None, "search": search, "sensitivity": sensitivity,
        "thresholds": thresholds, "threshold": threshold,
        "activations": activations, "rounding": rounding, "bias_correction": bias_correction,
        "equalisation": equalisation, "rows": rows, "effort": effort, "seed": seed,
        "mean": numbers(mean, "--mean"), "std": numbers(std, "--std"), "calibration": calibration,
        "dialect": dialect, "memory": memory,
        "calibration_images": calibration_images, "probe_images": probe_images, "attack_images": attack_images,
        "evaluations": evaluations,
    }  # fmt: skip
    if baseline:
        options["baselines"] = tuple(baseline)
    check_options(options)
    if show_config:
        typer.echo(described(context), nl=False)
        raise typer.Exit
    shape = image_shape(input_shape)
    options |= {
        "data": data, "factory": factory, "trust": trust, "input_shape": shape, "plan": plan,
        "axes": sizes(axis or []), "emit": tuple(emit or ()), "cache": cache_folder() if cache else None, "out": folder,
    }  # fmt: skip
    if dry_run:
        found = run_preview(model, quiet, threads, **options)
        typer.echo(found.model_dump_json(indent=2) if as_json else found.text(), nl=as_json)
        raise typer.Exit
    bundle = run_job(model, quiet, threads, resume=resume, storage=storage, study=study, **options)
    if verbose:
        typer.echo(where_time_went(bundle.manifest), err=True, nl=False)
    finish(bundle, folder, as_json)
