"""The process that keeps a node in its cluster, with a shell in Ray's place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from moray.deploy.cluster.keeper import STARTED

KEEPER = "import sys; from moray.deploy.cluster import keeper; keeper._AGAIN_S = 0; keeper.main(*sys.argv[1:])"


def start(log: Path, head: str, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", KEEPER, str(log), head, "sh", "-c", script], env=dict(os.environ))


def test_what_does_not_start_is_not_tried_again(tmp_path: Path) -> None:
    with start(tmp_path / "log", "127.0.0.1:1", "echo no; exit 3") as keeper:
        assert keeper.wait() == 3
    assert (tmp_path / "log").read_text() == "no\n"


def test_what_ended_is_started_when_the_head_answers_and_ends_with_its_keeper(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    script = f"echo {STARTED}; echo $$ >> {pids}; [ $(wc -l < {pids}) = 2 ] || exit 1; exec sleep 1000"
    with (
        socket.create_server(("127.0.0.1", 0)) as head,
        start(tmp_path / "log", f"127.0.0.1:{head.getsockname()[1]}", script) as keeper,
    ):
        while len(pids.read_text().split()) < 2:
            time.sleep(0.02)
        keeper.terminate()
        assert keeper.wait() == 0
    while any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()):  # or it hangs here
        time.sleep(0.02)
