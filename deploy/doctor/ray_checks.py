"""Checks of Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from moray.deploy.doctor.check import Check
from moray.deploy.doctor.child import ChildError, ask_child

ANSWER_TIMEOUT_S = 60.0


def check_ray() -> Iterator[Check]:
    yield Check("ray", "ok", metadata.version("ray"))
    yield judge_ray_token(os.environ, Path.home() / ".ray" / "auth_token")


def judge_ray_token(environ: Mapping[str, str], token_file: Path) -> Check:
    """What Ray will do about authentication. An engine's own session always has a fresh token; clusters may not."""
    name, mode = "ray authentication", environ.get("RAY_AUTH_MODE", "")
    if mode and mode.lower() != "token":
        found = f"RAY_AUTH_MODE={mode}: Ray asks for no token, so whoever reaches its ports can run code as you"
        return Check(name, "warning", found, "unset RAY_AUTH_MODE, or set it to token on every machine")
    if environ.get("RAY_AUTH_TOKEN"):
        return Check(name, "ok", "token, from RAY_AUTH_TOKEN")
    if path := environ.get("RAY_AUTH_TOKEN_PATH"):
        if Path(path).is_file():
            return Check(name, "ok", f"token, from {path}")
        found = f"RAY_AUTH_TOKEN_PATH={path} is not a file"
        return Check(name, "warning", found, "unset it, or copy the cluster's token there, before joining a cluster")
    if not token_file.is_file():
        return Check(name, "ok", "a fresh token for each local engine; none stored for clusters")
    found = f"a fresh token for each local engine; {token_file} for clusters"
    if mode:
        return Check(name, "ok", found)
    # With this file `ray start --head` asks for the token, but `ray start --address` does not send it.
    remedy = "for a cluster, set RAY_AUTH_MODE=token on every machine and copy the head's token file to all of them"
    return Check(name, "ok", found, remedy)


def check_ray_session() -> Iterator[Check]:
    try:
        found = ask_child(try_ray)
    except ChildError as error:
        remedy = "the reason is in /tmp/ray/session_latest/logs, or where RAY_TMPDIR says; see also the checks above"
        yield Check("ray session", "problem", f"a local session does not work: {error}", remedy)
        return
    yield judge_ray_session(found, _count_torch_gpus())


def judge_ray_session(found: Mapping[str, Any], num_torch_gpus: int) -> Check:
    text = (
        f"started in {found['start_s']:.1f} s, a worker answered in {found['answer_s']:.1f} s, "
        f"stopped in {found['stop_s']:.1f} s; GPUs: {found['num_gpus']}"
    )
    if num_torch_gpus and not found["num_gpus"]:
        remedy = "engines would not use the GPU that torch sees: check that `nvidia-smi` works, as Ray asks its library"
        return Check("ray session", "warning", text, remedy)
    return Check("ray session", "ok", text)


def try_ray() -> dict[str, Any]:
    """Start Ray here, have a worker import moray and answer, stop it. Runs in a child: Ray may end its process."""
    import ray

    from moray.cluster import ray_session
    from moray.runtime.errors import ClusterError

    begin = perf_counter()
    try:
        session = ray_session.start_local(1)
    except ClusterError as error:
        raise error.__cause__ or error from None  # its advice is to run us
    started = perf_counter()
    try:
        # Outside actors/spawn.py: no part of an engine, whose faults would look like Ray's if that were imported here.
        ray.get(ray.remote(_answer).remote(), timeout=ANSWER_TIMEOUT_S)
        answered = perf_counter()
        num_gpus = sum(node.num_gpus for node in ray_session.living_nodes())
    finally:
        ray_session.leave(session)
    return {
        "start_s": started - begin,
        "answer_s": answered - started,
        "stop_s": perf_counter() - answered,
        "num_gpus": num_gpus,
    }


def _answer() -> int:
    return os.getpid()


def _count_torch_gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()
