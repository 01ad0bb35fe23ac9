"""What ``moray plan`` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moray.cluster.topology import Topology, measure_node
from moray.deploy.config import demo_store
from moray.deploy.memory_plan import plan_rows
from moray.deploy.plan import ClusterPlan, PlannedNode, make_plan, planned_store, to_json, topology_of
from moray.deploy.plan_config import DISK_BYTES_S, PlanConfig, plan_config_of_file, plan_config_of_flags
from moray.runtime.errors import ConfigError
from moray.runtime.memory import format_bytes


def run_plan(
    model: Path | None,
    recipe: str | None,
    nodes: Sequence[str],
    links: Sequence[str],
    cluster: Path | None,
    address: str | None,
    context: int | None,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """Plan for the nodes that are described, for those of a running cluster, or for this machine. Raises MorayError."""
    if sum((bool(nodes), cluster is not None, address is not None)) > 1:
        raise ConfigError("give one of --node, --cluster and --address: they all say which nodes there are")
    if links and not nodes:
        raise ConfigError("--link goes with --node; in a file, links are under `links`")
    path = model or demo_store()
    with planned_store(path, recipe) as store:
        if nodes or cluster is not None:
            config = plan_config_of_flags(nodes, links) if cluster is None else plan_config_of_file(cluster)
            plan = _plan_described(str(path), store, config, context)
        elif address is None:
            report = measure_node(store)
            if store != path:  # an outline's files are holes
                report = replace(report, disk_bytes_per_s=DISK_BYTES_S)
            plan = make_plan(str(path), store, Topology("here", {"here": report}, {}), context=context)
        elif store == path:
            plan = make_plan(str(path), store, _measured(store, address), context=context)
        else:
            raise ConfigError(
                f"{path} is not converted, and a cluster is measured with a store; describe it with --node or --cluster"
            )
    if as_json:
        console.print_json(json.dumps(to_json(plan)))
    else:
        _print(plan, console)


def _plan_described(model: str, store: Path, config: PlanConfig, context: int | None) -> ClusterPlan:
    host_memory = {name: node.host_memory for name, node in config.nodes.items() if node.host_memory is not None}
    assumed = [name for name, node in config.nodes.items() if node.is_assumed]
    return make_plan(model, store, topology_of(config), context=context, host_memory=host_memory, assumed=assumed)


def _measured(store: Path, address: str) -> Topology:
    """A running cluster."""
    from moray.actors.measurement import measure_cluster
    from moray.cluster import ray_session
    from moray.cluster.nodes import choose_compute_node

    session = ray_session.join(address)
    try:
        node = choose_compute_node(ray_session.living_nodes(), ray_session.this_node(), needs_gpu=False)
        return measure_cluster(str(store.absolute()), node.node_id)
    finally:
        ray_session.leave(session)


def _print(plan: ClusterPlan, console: Console) -> None:
    console.print(
        f"{plan.model}: {plan.num_experts} experts, {format_bytes(plan.manifest.expert_bytes)}", highlight=False
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("node", "free memory", "experts", "replicas", "arena", "computes", "disk", "link"):
        table.add_column(name, justify="left" if name in ("node", "link") else "right")
    for node in plan.nodes:
        table.add_row(*_row(plan, node))
    console.print(table, highlight=False)
    for node in plan.nodes:
        if node.problem:
            console.print(f"{node.name} is not used: {node.problem}", markup=False, highlight=False)
    assumed = [node.name for node in plan.nodes if node.is_assumed]
    if assumed:
        console.print(f"rates of {', '.join(assumed)}: assumed, as of an ordinary PC", highlight=False)
    console.print()
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in (plan_rows(plan.memory) | _predicted(plan)).items():
        rows.add_row(name, text)
    console.print(rows, highlight=False)


def _row(plan: ClusterPlan, node: PlannedNode) -> list[str]:
    report, link = node.report, node.link
    return [
        node.name,
        format_bytes(report.memory_bytes),
        str(node.num_experts),
        str(node.num_replicas),
        format_bytes(node.num_slots * plan.memory.slot_bytes),
        f"{report.compute.bytes_per_s / 1e9:.1f} GB/s",
        f"{report.disk_bytes_per_s / 1e9:.1f} GB/s",
        "computes" if link is None else f"{8 * link.bytes_per_s / 1e6:,.0f} Mbit/s, {1e3 * link.latency_s:.2g} ms",
    ]


def _predicted(plan: ClusterPlan) -> dict[str, str]:
    found = plan.prediction
    rows = {
        "decode": f"{found.decode_tokens_per_s:.3g} tokens/s: {1e3 * found.trunk_s:.3g} ms trunk and "
        f"{1e3 * found.experts_s:.3g} ms experts a token",
        "prefill": f"{found.prefill_tokens_per_s:.3g} tokens/s",
        "over links": f"{format_bytes(found.link_bytes_per_token)} a token",
        "from disk": f"{format_bytes(found.disk_bytes_per_token)} a token, {100 * found.hit_rate:.1f} % hits",
        "experts are used": f"as in {plan.num_recorded_calls} recorded layer calls"
        if plan.num_recorded_calls
        else "evenly, as far as is known: no traffic of this store is recorded",
    }
    if plan.placement.left_out:
        rows["does not fit"] = (
            f"{len(plan.placement.left_out)} of {plan.num_experts} experts ({format_bytes(plan.left_out_bytes)}) are "
            f"read from the disk of {plan.nodes[0].name} when needed"
        )
        rows["what helps"] = "; ".join(plan.advice)
    else:
        rows["fits"] = "every expert is in memory"
    return rows
