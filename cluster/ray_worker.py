"""Starts a Ray worker: what Ray's own ``setup_worker.py`` does for a worker without a runtime environment, in the same
process. Ray's imports Ray, then a shell and a second Python that imports it again: half a second of a worker's start.

Run by a raylet (ray_session.py), by file path: ``ray_worker.py [FLAG...] DEFAULT_WORKER.PY ARGUMENT...``
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    if sys.path and Path(sys.path[0]) == Path(__file__).parent:
        del sys.path[0]  # a worker must not find moray's modules as its own
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language", default="PYTHON")
    known, rest = parser.parse_known_args()
    worker = next(index for index, word in enumerate(rest) if word.endswith(".py"))
    flags, script, arguments = rest[:worker], rest[worker], rest[worker + 1 :]
    if flags or known.serialized_runtime_env_context != "{}" or known.language != "PYTHON":
        ray_own = str(Path(script).with_name("setup_worker.py"))
        os.execv(sys.executable, [sys.executable, ray_own, *sys.argv[1:]])
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
