"""Real processes that run our code, for tests of what lies between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import moray

# The package and these helpers as this process imports them, whatever is installed.
_PATHS = [str(Path(moray.__file__).parents[1]), str(Path(__file__).parents[1])]


def start_python(*args: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``python ARGS`` with this process's modules importable, its input and output piped."""
    return subprocess.Popen(
        [sys.executable, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(_PATHS)} | environment,
    )


@contextmanager
def child(script: str, *args: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``script``; it is killed and reaped at the end."""
    process = start_python("-c", script, *args, **environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line a child prints; it must print one."""
    pipe: IO[str] | None = process.stdout
    assert pipe is not None
    line = pipe.readline()
    assert line, f"the child ended without a word, exit status {process.wait()}"
    return line.rstrip("\n")
