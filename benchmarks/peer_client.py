"""llama.cpp in a process of its own: starts peer_worker.py under the peer's interpreter and asks it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("peer_worker.py")
_VARIABLE = "MORAY_PEER_PYTHON"

#: Lines of llama.cpp's load log that say which kernels, buffers and attention it took.
_TELLING = re.compile(r"REPACK|buffer size|flash_attn  |Flash Attention|load_mode|file size")
_REPACKED = re.compile(r"repack tensor \S+ with (\S+)")


class Peer:
    """A running worker. One request at a time."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [python, _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ends the program with the worker's words if it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op} | fields) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"the peer's process ended with code {self._process.wait()} during {op!r}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"llama.cpp: {answer['error']}")
        return answer

    def load(
        self,
        model: Path,
        *,
        threads: int,
        context: int = 1024,
        batch: int = 512,
        sequences: int = 1,
        load_mode: int | None = None,
        repack: bool | None = None,
    ) -> dict[str, Any]:
        """Load a model. Returns ``log``, ``version`` and ``system``."""
        return self.request(
            "load",
            model=str(model),
            threads=threads,
            context=context,
            batch=batch,
            sequences=sequences,
            load_mode=load_mode,
            repack=repack,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def open_peer(python: Path) -> Iterator[Peer]:
    peer = Peer(python)
    try:
        yield peer
    finally:
        peer.close()


def telling_lines(log: str) -> list[str]:
    """What matters of llama.cpp's load log, in its own words; repacked tensors are counted."""
    repacked = Counter(_REPACKED.findall(log))
    lines = [line.strip(" .") for line in log.splitlines() if _TELLING.search(line) and not _REPACKED.search(line)]
    return lines + [f"repacked as {kind}: {count} tensors" for kind, count in repacked.items()]


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """The flag for the peer's interpreter."""
    given = os.environ.get(_VARIABLE)
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=given,
        required=given is None,
        help=f"an interpreter with llama-cpp-python and numpy (${_VARIABLE})",
    )
