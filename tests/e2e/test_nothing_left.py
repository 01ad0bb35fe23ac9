"""Whatever process ends, and however: no memory of ours stays, and no process of ours."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

pytestmark = pytest.mark.ray

COMMAND = [sys.executable, "-m", "moray.deploy.cli", "generate", "import os\n", "--hosts", "2", "--max-new-tokens"]
SLOWER = ["--speculation", "off"]  # the embedded model repeats itself: it would be done before anything happens to it


@dataclass(frozen=True)
class Running:
    """``moray generate`` in the middle of its stream, and every process it started."""

    process: subprocess.Popen[bytes]
    children: list[psutil.Process]

    def named(self, text: str) -> psutil.Process:
        return next(child for child in self.children if text in " ".join(child.cmdline()))

    def arenas(self) -> list[int]:
        """Pids of our processes that still hold an arena."""
        return [child.pid for child in self.children if _holds_arena(child.pid)]


@contextmanager
def generating(max_new_tokens: int) -> Iterator[Running]:
    process = subprocess.Popen(
        [*COMMAND, str(max_new_tokens), *SLOWER], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # what is not read stops it long before the end
    try:
        seen = b""
        while seen.count(b"\n") < 4:  # some lines after the prompt: the model is generating
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, seen.decode()
            seen += piece
        children = psutil.Process(process.pid).children(recursive=True)
        running = Running(process, children)
        assert len(running.arenas()) == 3  # two hosts and the compute actor
        yield running
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.long  # as below, but for the kill
def test_a_normal_end_leaves_nothing() -> None:
    with generating(300) as running:
        assert running.process.stdout is not None
        output = running.process.stdout.read().decode()
        assert running.process.wait(60) == 0
        assert "of 48 used" in output
        assert_nothing_left(running)


def test_interrupting_is_clean() -> None:
    with generating(1900) as running:
        running.process.send_signal(signal.SIGINT)
        assert running.process.stdout is not None
        output = running.process.stdout.read().decode()
        assert running.process.wait(60) == 130
        assert "Traceback" not in output
        assert output.strip().endswith("stopped")
        assert_nothing_left(running)


def test_killing_the_driver_frees_memory_at_once() -> None:
    with generating(1900) as running:
        running.process.kill()
        running.process.wait()
        assert_no_arena(running, seconds=5)
        assert_nothing_left(running)


def test_killing_the_compute_actor_pauses_the_text_and_leaves_nothing() -> None:
    with generating(1900) as running:
        running.named(":ComputeActor").kill()
        output = finish(running, expected={0})
        assert "1900 tokens" in output and "of 48 used" in output and "(raylet)" not in output


@pytest.mark.long
@pytest.mark.parametrize("victim", ["raylet/raylet", "gcs_server"])
def test_killing_ray_s_own_processes_is_survived_or_ends_in_one_clear_error(victim: str) -> None:
    """No layer and no token needs Ray: a short answer may end well before anybody notices."""
    with generating(1900) as running:
        running.named(victim).kill()
        finish(running, expected={0, 1})


def finish(running: Running, expected: set[int]) -> str:
    """Wait for the command. Returns what it still printed."""
    assert running.process.stdout is not None
    output = running.process.stdout.read().decode()
    assert running.process.wait(90) in expected
    assert "Traceback" not in output
    assert ("error: " in output) == (running.process.returncode != 0)
    assert_nothing_left(running)
    return output


def assert_no_arena(running: Running, seconds: float) -> None:
    deadline = monotonic() + seconds
    while running.arenas():
        assert monotonic() < deadline, f"arenas are still held by {running.arenas()}"
        sleep(0.05)


def assert_nothing_left(running: Running) -> None:
    """Every process that was started is gone within 60 s, and no arena outlives the first seconds."""
    assert_no_arena(running, seconds=15)
    _, alive = psutil.wait_procs(running.children, timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def _holds_arena(pid: int) -> bool:
    try:
        return "memfd:moray-arena" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
