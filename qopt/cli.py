"""The command line. Results go to stdout, progress and messages to stderr; nothing below this file prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qopt._version import __version__
from qopt.errors import QoptError, UsageError

EXIT_CODES = """

Exit codes: 0 emitted and every gate holds; 1 emitted but a gate failed; 2 usage or configuration; 3 model not
supported; 4 internal error; 130 interrupted.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Quantize a network, choose every layer's format under Lipschitz thresholds, and attack the file that ships.",
    epilog=EXIT_CODES.strip(),
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `qopt` command."""
    try:
        app(standalone_mode=True)
    except QoptError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        text = " ".join(str(error).split()) or "no message"
        _fail(f"internal error: {type(error).__name__}: {text}; --debug shows where", 4)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"qopt: {message}\n")
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qopt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a network, choose every layer's format under Lipschitz thresholds, and attack the file that ships."""


MODEL = "A torch.export archive, a state dict or safetensors file with --model, or an ONNX file."
DATA = "Images: a .npz file, a folder of class folders, or package.module:factory."
EXAMPLES = """
Examples:

    qopt optimize model.onnx --target int4

    qopt optimize model.pt --target int4 --robust --data images.npz --eps 8/255 -o out

    qopt optimize weights.pt --model package.module:factory --input-shape 3,32,32 --limit "bits<=3.5"
"""


@app.command(epilog=EXAMPLES)
def optimize(
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
    search: Annotated[str, typer.Option(help="Strategy: greedy, lipschitz, uniform.")] = "greedy",
    thresholds: Annotated[str, typer.Option(help="Form: auto, paper, relative, weighted, none.")] = "auto",
    threshold: Annotated[float, typer.Option(help="Bound of relative and weighted thresholds.")] = 0.25,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to apply instead of searching.")] = None,
    activations: Annotated[
        str | None, typer.Option(help="Activation format, such as int8 or float. [target's]")
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
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    calibration: Annotated[
        str, typer.Option(help="Calibrate on clean, adversarial or mixed images. [mixed if robust]")
    ] = "auto",
    calibration_images: Annotated[int, typer.Option(help="Images that ranges are observed on, at most.")] = 1024,
    probe_images: Annotated[int, typer.Option(help="Images that plans are compared on, at most.")] = 256,
    attack_images: Annotated[int, typer.Option(help="Report images that are attacked, at most.")] = 1000,
    seed: Annotated[int, typer.Option(help="Every random choice derives from it.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    cache: Annotated[bool, typer.Option(help="Keep expensive evaluations by content.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Compile MODEL into a low-bit ONNX file, measure it and attack it."""
    del debug  # read by main, which must know it even when parsing fails
    folder = out or Path(f"{Path(model).stem}.qopt")
    _check_folder(folder)
    options: dict[str, Any] = {
        "target": target, "robust": robust, "norm": norm, "eps": eps, "limits": tuple(limit or ()),
        "gates": tuple(gate) if gate else None, "search": search, "thresholds": thresholds, "threshold": threshold,
        "activations": activations, "rounding": rounding, "bias_correction": bias_correction,
        "equalisation": equalisation, "rows": rows, "effort": effort, "seed": seed,
        "mean": _numbers(mean, "--mean"), "std": _numbers(std, "--std"), "calibration": calibration,
        "calibration_images": calibration_images, "probe_images": probe_images, "attack_images": attack_images,
    }  # fmt: skip
    if baseline:
        options["baselines"] = tuple(baseline)
    _check_options(options)
    shape = tuple(int(size) for size in _numbers(input_shape, "--input-shape")) or None
    bundle = _run(
        model, quiet, threads, data=data, factory=factory, trust=trust, input_shape=shape, plan=plan,
        cache=_cache_folder() if cache else None, **options,
    )  # fmt: skip
    bundle.write(folder)
    from qopt.terminal import show

    typer.echo(bundle.report.to_json(), nl=False) if as_json else show(bundle, folder)
    raise typer.Exit(bundle.exit_code)


@app.command()
def plugins(
    group: Annotated[str | None, typer.Argument(help="One group, such as qopt.searches. [all]")] = None,
) -> None:
    """List every plugin with its origin, and why it does not load where it does not."""
    from qopt.plugins import BUILT_IN, checked
    from qopt.plugins import plugins as table

    if group is not None and group not in BUILT_IN:
        from qopt.errors import nearest

        raise UsageError("unknown plugin group", got=repr(group), fix=nearest(group, BUILT_IN))
    for name in [group] if group else sorted(BUILT_IN):
        typer.echo(name)
        for plugin in map(checked, table(name).values()):
            typer.echo(f"  {plugin.name:<22} {plugin.origin:<20} {plugin.error or plugin.target}")


def _run(model: str, quiet: bool, threads: int | None, **arguments: Any) -> Any:
    from qopt.progress import reporter
    from qopt.quiet import stdout_to_stderr

    try:
        with reporter(quiet) as progress, stdout_to_stderr():
            progress("load")
            import torch

            from qopt.api import optimize as compile_model

            if threads is not None:
                torch.set_num_threads(threads)
            return compile_model(model, progress=progress, **arguments)
    except KeyboardInterrupt:  # the command framework would end without a word
        _fail("interrupted, nothing was written", 130)


def _numbers(text: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError("not a list of numbers", where=where, expected="like 0.5,0.5,0.5", got=repr(text)) from error


def _check_options(options: dict[str, Any]) -> None:
    """Refuse wrong words at once, before the seconds that importing torch takes."""
    from qopt.config import resolve_options
    from qopt.hardware.targets import parse_target
    from qopt.plugins import plugins as table

    resolved = resolve_options(**options)
    parse_target(resolved.target)
    if resolved.search not in table("qopt.searches"):
        from qopt.errors import nearest

        known = nearest(resolved.search, table("qopt.searches"))
        raise UsageError("unknown name", where="--search", got=repr(resolved.search), fix=known)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError("the output folder is a file", where=str(folder), fix="choose another with -o")


def _cache_folder() -> Path:
    from qopt.cache import default_folder

    return default_folder()
