"""Trying what may end its process: a child process does it, and answers with one line of JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from moray.deploy.doctor.check import describe

TIMEOUT_S = 300.0  # compiling the kernels for the first time takes about 10 s, starting Ray about 5 s


class ChildError(Exception):
    """The child process failed, died or did not answer. The message is one line."""


def ask_child(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a module's function in a process of its own. Raises ChildError, whatever becomes of that."""
    name = function.__name__
    program = f"from {function.__module__} import {name}; from {__name__} import answer_parent; answer_parent({name})"
    command = [sys.executable, "-P", "-c", program]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ChildError(f"no answer after {TIMEOUT_S:.0f} s") from None
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        raise ChildError(_explain_death(child.returncode, child.stderr))
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise ChildError(answer["error"])
    return answer


def answer_parent(function: Callable[[], dict[str, Any]]) -> None:
    """What the child runs."""
    try:
        answer = function()
    except Exception as error:
        answer = {"error": describe(error)}
    print(json.dumps(answer), flush=True)


def _explain_death(returncode: int, stderr: str) -> str:
    ended = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"the process that tried ended with {ended}" + (f": {lines[-1][:300]}" if lines else "")
