"""What ``moray generate --stats`` prints: where experts were found, what the disk did, what prefetch was worth."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moray.actors.messages import EngineStats
from moray.runtime.experts.shard_host import HostStats
from moray.runtime.memory import format_bytes

NOTES = (
    "use: one expert of one layer call. hit: it was in memory when the call began; miss: the call waited for it, or "
    "computed other experts meanwhile",
    "waiting: with nothing to compute. busy: with at least one read under way",
    "prefetch, used: loaded before it was needed; late: needed while it was loading; wasted: gone, or contradicted, "
    "before a use. precision: used and late of all that ended; recall: of what would have been missed",
)


def print_stats(stats: EngineStats, console: Console) -> None:
    experts, fetches = stats.experts, stats.fetches
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = stats.hits / experts.uses if experts.uses else 1.0
    table.add_row("uses", f"{experts.uses}: {stats.hits} hits ({share:.1%}), {fetches.misses} misses")
    table.add_row("missed", f"{format_bytes(fetches.missed_bytes)}; {fetches.wait_s:.3f} s waiting")
    table.add_row("computing", f"{experts.compute_s:.3f} s of experts in {experts.layer_calls} layer calls")
    table.add_row("policy", stats.policy)
    table.add_row("prefetch", stats.prefetch)
    if stats.device is not None:
        device = stats.device
        uses = ", ".join(f"{name} {count}" for name, count in device.uses_by_lane.items() if count)
        table.add_row(f"{device.device} memory", f"{device.num_resident} experts in {device.num_slots} slots")
        table.add_row(f"{device.device} lanes", f"{uses}; {device.copies} copies, {device.evictions} evicted")
    for host in stats.hosts:
        for name, text in _host_rows(host):
            table.add_row(f"{host.host_id} {name}", text)
    console.print(table, highlight=False)
    for note in NOTES:
        console.print(note, style="dim", highlight=False)


def _host_rows(host: HostStats) -> list[tuple[str, str]]:
    residency, loader, prefetch = host.residency, host.loader, host.prefetch
    size = format_bytes(host.num_slots * host.slot_bytes)
    rows = [
        ("memory", f"{host.num_resident} of {host.num_experts} experts in {host.num_slots} slots, {size}"),
        (
            "loads",
            f"{residency.demand_loads} on demand, {residency.hint_loads} predicted, {residency.fill_loads} to fill; "
            f"{residency.evictions} evicted",
        ),
    ]
    if loader.busy_s:
        rate = format_bytes(loader.bytes_read / loader.busy_s)
        repeated = f"; {loader.corrupt_reads} failed a checksum" if loader.corrupt_reads else ""
        rows.append(
            (
                "disk",
                f"{format_bytes(loader.bytes_read)} read, {rate}/s while busy, {loader.depth} reads at once{repeated}",
            )
        )
    if prefetch.num_begun or prefetch.num_refused or prefetch.num_unlikely:
        rows.append(
            (
                "prefetch",
                f"{prefetch.num_used} used, {prefetch.num_late} late, {prefetch.num_wasted} wasted, "
                f"{prefetch.num_unlikely} unlikely, {prefetch.num_refused} without budget; "
                f"precision {prefetch.precision:.1%}, recall {prefetch.recall:.1%}",
            )
        )
        rows.append(("prefetch is", prefetch.reason))
    return rows
