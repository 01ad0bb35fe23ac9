from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moray.cluster import ray_session

_SCRIPTS = Path(ray_session.__file__).parent
_TELL = "import sys; print(__file__, *sys.argv[1:], sys.path[0])\n"


def test_a_raylet_gets_stand_ins_for_its_agents_and_starts_workers_ahead() -> None:
    command = ["raylet", "--head", "--num_prestart_python_workers=8", "--dashboard_agent_command=python a.py --x=1"]
    command += ["--runtime_env_agent_command=python b.py", "--labels={}"]
    light = ray_session._raylet_command(command, 3, with_agents=False)
    assert light[:3] == ["raylet", "--head", "--num_prestart_python_workers=3"]
    assert light[-1] == "--labels={}"
    for word in light[3:5]:
        name, _, agent = word.partition("=")
        assert name.endswith("_agent_command")
        assert Path(shlex.split(agent)[-1]) == _SCRIPTS / "ray_idle.py"
    served = ray_session._raylet_command(command, 3, with_agents=True)
    assert served == [*light[:3], *command[3:]]


def _start(folder: Path, *arguments: str) -> list[str]:
    for name in ("default_worker.py", "setup_worker.py"):
        (folder / name).write_text(_TELL)
    command = [sys.executable, str(_SCRIPTS / "ray_worker.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_plain_worker_starts_in_the_same_process_without_our_folder(tmp_path: Path) -> None:
    worker = str(tmp_path / "default_worker.py")
    told = _start(tmp_path, worker, "--worker-id=7", "--language=PYTHON", "--serialized-runtime-env-context={}")
    assert told[:2] == [worker, "--worker-id=7"]
    assert Path(told[2]) != _SCRIPTS


@pytest.mark.parametrize("more", ["--serialized-runtime-env-context={'env_vars': {}}", "--language=JAVA"])
def test_any_other_worker_is_started_as_ray_does(tmp_path: Path, more: str) -> None:
    worker = str(tmp_path / "default_worker.py")
    told = _start(tmp_path, worker, "--worker-id=7", more)
    assert told[0] == str(tmp_path / "setup_worker.py")
    assert " ".join(told[1:-1]) == f"{worker} --worker-id=7 {more}"


def test_a_stand_in_for_an_agent_ends_with_the_raylet() -> None:
    idle = shlex.join([sys.executable, "-I", "-S", str(_SCRIPTS / "ray_idle.py")])
    script = f"export RAY_RAYLET_PID=$$; {idle} & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as raylet:
        assert raylet.stdout is not None
        agent = os.pidfd_open(int(raylet.stdout.readline()))
        raylet.send_signal(signal.SIGKILL)
        assert select.select([agent], [], [], 60)[0]  # it has ended
        os.close(agent)
