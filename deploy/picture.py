"""Pictures that commands draw: matplotlib and the file, checked before the work, and written after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moray.runtime.errors import ConfigError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(output: Path, option: str) -> None:
    """Raises InputError without matplotlib, ConfigError without a directory, naming the ``option`` that gave it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"plotting needs matplotlib, which is not installed ({error}); pip install 'moray-moe[plot]'"
        ) from error
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {output}: no such directory; choose another file with {option}")


def make_figure(width_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, 4.5), layout="constrained")


def write_picture(figure: Figure, output: Path, option: str) -> None:
    """As PNG. Raises ConfigError."""
    try:
        figure.savefig(output, dpi=150, format="png")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}; choose another file with {option}") from error
