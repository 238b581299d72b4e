"""`qopt doctor`: what a model file is, and whether and how far it can be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qopt.commands.running import image_shape
from qopt.errors import InterruptedRunError

EXAMPLES = """
Examples:

    qopt doctor model.onnx

    qopt doctor weights.safetensors --model package.module:factory --input-shape 3,32,32
"""


def doctor(
    model: Annotated[Path, typer.Argument(help="A model file of any kind that `qopt optimize` takes.")],
    factory: Annotated[str | None, typer.Option("--model", help="package.module:factory of a state dict.")] = None,
    input_shape: Annotated[str, typer.Option(help="Shape of one image, such as 3,32,32.")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as one JSON object.")] = False,
) -> None:
    """Say what MODEL is and what can be done with it; nothing is written.

    Exit code 0 where it can be compiled, else what `qopt optimize` would end with: 3 where it is not supported, 2 where
    an option is wrong or missing.
    """
    shape = image_shape(input_shape)
    from qopt.quiet import stdout_to_stderr

    try:
        with stdout_to_stderr():
            from qopt.job.doctor import diagnose, show_diagnosis

            found = diagnose(model, factory=factory, trust=trust, input_shape=shape)
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted") from None
    typer.echo(found.to_json() if as_json else show_diagnosis(found), nl=False)
    raise typer.Exit(found.exit_code)
