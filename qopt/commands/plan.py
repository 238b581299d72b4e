"""`qopt plan show | diff | apply`: plans are files that people read, compare, edit and apply."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qopt.commands.running import cache_folder, check_folder, check_options, finish, image_shape, run_job

if TYPE_CHECKING:
    from qopt.plan import Plan

plan = typer.Typer(no_args_is_help=True, help="Read, compare and apply plans.")

FILE = "A plan.json, or the output folder that holds one."


@plan.command(epilog="Example: `qopt plan show out`")
def show(file: Annotated[Path, typer.Argument(help=FILE)]) -> None:
    """Print a plan: what every layer and tensor gets, and why."""
    from qopt.plan_text import show_plan

    typer.echo(show_plan(_read(file)), nl=False)


@plan.command(epilog="Example: `qopt plan diff out other`")
def diff(
    old: Annotated[Path, typer.Argument(help=FILE)],
    new: Annotated[Path, typer.Argument(help=FILE)],
) -> None:
    """Print what differs between two plans; exit code 1 where anything does."""
    from qopt.plan_text import diff_plans

    text = diff_plans(_read(old), _read(new))
    typer.echo(text, nl=False)
    raise typer.Exit(1 if text else 0)


@plan.command(epilog="Example: `qopt plan apply edited.json model.onnx --data images.npz -o again`")
def apply(
    file: Annotated[Path, typer.Argument(help=FILE)],
    model: Annotated[str, typer.Argument(help="The float model that the plan is for.")],
    data: Annotated[str | None, typer.Option(help="Images, as `qopt optimize` takes them.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder. [MODEL's name].qopt")] = None,
    robust: Annotated[bool, typer.Option("--robust", help="Attack the file, and gate on what is found.")] = False,
    eps: Annotated[str | None, typer.Option(help="Radius of the threat model, such as 8/255.")] = None,
    factory: Annotated[str | None, typer.Option("--model", help="package.module:factory of a state dict.")] = None,
    input_shape: Annotated[str, typer.Option(help="Shape of one image, such as 3,32,32. [from --data]")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Quantize MODEL by a plan instead of searching; `qopt optimize --plan` is the same with every option."""
    folder = out or Path(f"{Path(model).stem}.qopt")
    check_folder(folder)
    check_options({"robust": robust, "eps": eps})
    shape = image_shape(input_shape)
    bundle = run_job(
        model, quiet, None, data=data, factory=factory, trust=trust, input_shape=shape, plan=_path(file),
        cache=cache_folder(), robust=robust, eps=eps, out=folder,
    )  # fmt: skip
    finish(bundle, folder, as_json)


def _path(file: Path) -> Path:
    return file / "plan.json" if file.is_dir() else file


def _read(file: Path) -> Plan:
    from qopt.plan import read_plan

    return read_plan(_path(file))
