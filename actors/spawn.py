"""Making actors and tasks: the only module that uses ``ray.remote``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from moray.actors.calls import PART, fetch, first_line
from moray.actors.host import ExpertHost
from moray.actors.messages import HostConfig
from moray.actors.ray_home import RayHome, find, host_name, named
from moray.cluster import ray_session
from moray.cluster.nodes import NodeInfo
from moray.runtime.errors import ClusterError

T = TypeVar("T")

FOR_EVER = -1
_KEEPER_CALLS = 8
_HOST_CALLS = 4  # statistics while somebody waits for the arena to fill
_TASK_S = 120.0  # for a task on another node: a worker starts there and imports moray
_NODE_LABEL = "ray.io/node-id"  # every node has this label from Ray


def make_remote(kind: type, groups: dict[str, int] | None = None, **options: Any) -> Any:
    """A plain class as an actor: ``.remote(...)`` starts one. ``groups``: concurrency groups and their threads."""
    remote: Any = ray.remote  # its types know neither concurrency groups nor plain classes
    made = (remote(concurrency_groups=groups) if groups else remote)(kind)
    return made.options(num_cpus=0, **options)


def on_node(node_id: str) -> dict[str, Any]:
    """The option that makes an actor or a task run on this node."""
    return {"label_selector": {_NODE_LABEL: node_id}}


def start_host(engine: str, node: NodeInfo, config: HostConfig) -> Any:
    """An expert host on a node; returns its handle at once."""
    options = named(host_name(engine, node, config.address.host_id))
    options |= {"max_restarts": FOR_EVER, "max_concurrency": _HOST_CALLS}
    return make_remote(ExpertHost, {PART: 1}, **options, **on_node(node.node_id)).remote(config, RayHome(engine))


def keep(kind: type, name: str, *args: object) -> Any:
    """The one actor of this name, started on this node if there is none. It outlives this process, not the cluster."""
    options = named(name) | on_node(ray_session.this_node()) | {"lifetime": "detached", "get_if_exists": True}
    return make_remote(kind, max_concurrency=_KEEPER_CALLS, **options).remote(*args)


def find_kept(name: str) -> Any | None:
    """The actor that ``keep`` started under this name, if it lives."""
    try:
        return find(name)
    except ValueError:
        return None


def run_on(node: NodeInfo, function: Callable[..., T], *args: object) -> T:
    """Run a module's function on a node, in a process of its own. Raises MorayError as it was raised there."""
    [result] = run_on_all([(node, args)], function)
    return result


def run_on_all(calls: Sequence[tuple[NodeInfo, tuple[object, ...]]], function: Callable[..., T]) -> list[T]:
    """``run_on`` for nodes and arguments, all at once. Raises the first error, naming the node if it is not ours."""
    remote: Any = ray.remote
    task = remote(function)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0}
    started = [(node, task.options(**options, **on_node(node.node_id)).remote(*args)) for node, args in calls]
    results: list[Any] = []
    for node, reference in started:
        try:
            results.append(fetch(partial(ray.get, reference, timeout=_TASK_S)))
        except GetTimeoutError as error:
            raise ClusterError(
                f"node {node.name} ran no task within {_TASK_S:g} s; is its Ray process alive?"
            ) from error
        except RayError as error:
            raise ClusterError(
                f"node {node.name} cannot run moray ({first_line(error)}); install the same version of moray there, "
                "in the Python that its Ray was started from"
            ) from error
    return results


def kill_all(actors: Sequence[Any]) -> None:
    """The last one first."""
    for actor in reversed(actors):
        ray.kill(actor)
