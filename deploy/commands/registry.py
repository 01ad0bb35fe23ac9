"""Registering commands: an example under each one's help, errors in one line. Arguments that several commands have.

Errors of the user's are one line on stderr and exit code 2; of the cluster's, exit code 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moray.deploy.hub_commands import stay_offline
from moray.runtime.errors import InputError, MorayError

console = Console()
errors = Console(stderr=True, soft_wrap=True)

StoreArgument = Annotated[
    Path | None,
    typer.Argument(help="A store made by `moray convert`; none: the embedded demonstration model."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub; none: main.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def command(
    group: typer.Typer, example: str, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command of a group. ``name``: if it is not the function's."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                stay_offline(kwargs)
                function(*args, **kwargs)
            except InputError as error:
                _fail(error, 2)
            except MorayError as error:
                _fail(error, 1)
            except KeyboardInterrupt:
                errors.print("stopped")
                raise typer.Exit(130) from None

        group.command(name, epilog=f"Example: {example}")(run)
        return function

    return register


def _fail(error: Exception, code: int) -> None:
    errors.print(f"error: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(code) from None
