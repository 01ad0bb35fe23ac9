"""``moray convert`` and ``moray info``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moray.deploy.config import demo_store, make_config
from moray.deploy.hub_commands import is_hub_id
from moray.deploy.memory_plan import plan_engine, plan_rows
from moray.runtime.errors import ConfigError, MorayError
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.memory import format_bytes
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.manifest import NUMERICS_ID, Manifest
from moray.runtime.store.store import Store

if TYPE_CHECKING:
    from moray.runtime.convert.needs import Needs


class _Bar:
    """The converter's progress as a bar with an estimate of the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", start=False)

    def start(self, total_bytes: int) -> None:
        self._progress.start()  # only now: a checkpoint that is refused shows no bar
        self._progress.start_task(self._task)
        self._progress.update(self._task, total=total_bytes)

    def advance(self, num_bytes: int, what: str) -> None:
        self._progress.update(self._task, advance=num_bytes, description=what)


def convert_store(
    checkpoint: Path,
    store: Path,
    recipe: str,
    workers: int | None,
    console: Console,
    *,
    lora: Sequence[Path] = (),
    revision: str | None = None,
    stream: bool = False,
) -> None:
    """Convert a local checkpoint or, if there is none of this name, a hub's model."""
    # Imported here: `moray info` does without torch.
    from moray.runtime.convert.converter import convert
    from moray.runtime.convert.recipe import Recipe

    on_hub = is_hub_id(str(checkpoint))
    if not on_hub and (stream or revision is not None):
        option = "--stream" if stream else "--revision"
        raise ConfigError(f"{option} is for models on the hub (ORG/NAME), and {checkpoint} is a path; leave it out")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)
    bar = _Bar(progress)

    def announce(needs: Needs) -> None:
        console.print(f"the conversion {needs}", highlight=False)

    try:
        parsed = Recipe.parse(recipe)
        if on_hub:
            from moray.runtime.convert.hub_convert import convert_from_hub

            manifest = convert_from_hub(
                str(checkpoint),
                store,
                parsed,
                lora=lora,
                revision=revision,
                stream=stream,
                workers=workers,
                progress=bar,
                announce=announce,
            )
        else:
            manifest = convert(checkpoint, store, parsed, lora=lora, workers=workers, progress=bar, announce=announce)
    finally:
        progress.stop()
    console.print(f"{store} is complete:", highlight=False)
    console.print(_table(_describe(store, manifest)), highlight=False)


def show_store(path: Path | None, *, verify: bool, as_json: bool, console: Console) -> None:
    with Store.open(path or demo_store()) as store:
        if verify:
            _verify(store, console, quiet=as_json)
        facts = _describe(store.path, store.manifest) | {"fingerprint": store.fingerprint}
        if not store.is_whole:
            facts["partial"] = f"{len(store.present)} of {len(store.manifest.shards)} experts are here"
        if verify:
            facts["verified"] = "every byte"
        facts |= _serving(store.path)
        plan = _plan(store.path)
    if as_json:
        console.print_json(json.dumps(facts | {"memory": plan}))
    else:
        console.print(_table(facts | {f"memory: {name}": line for name, line in plan.items()}), highlight=False)


def _serving(path: Path) -> dict[str, str]:
    """How several requests at once are decoded. Nothing where the model cannot be measured: the plan says why."""
    try:
        can_batch = profile_of(path).sequence.can_batch
    except MorayError:
        return {}
    return {"several requests": "in one forward pass" if can_batch else "in turn: its caches cannot be batched"}


def _plan(path: Path) -> dict[str, str]:
    """What an engine would hold in this machine's memory, in words; or why it cannot be."""
    try:
        return plan_rows(plan_engine(path, make_config({})))
    except MorayError as error:
        return {"plan": f"none: {error}"}


def _verify(store: Store, console: Console, quiet: bool) -> None:
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task("", total=len(store.present) + 1)
        for _ in store.verify():
            progress.advance(task)


def _describe(path: Path, manifest: Manifest) -> dict[str, Any]:
    encodings = Counter(
        _encoding(tensor.spec) for layer in manifest.layers for tensor in layer.layout.tensors if tensor.spec
    )
    counts = sorted({layer.num_experts for layer in manifest.layers})
    return {
        "store": str(path),
        "family": manifest.family,
        "parameters": f"{manifest.num_parameters:,}",
        "MoE layers": len(manifest.layers),
        "experts a layer": ", ".join(str(count) for count in counts),
        "one expert": format_bytes(manifest.slot_bytes),
        "all experts": format_bytes(manifest.expert_bytes),
        "trunk": format_bytes(manifest.trunk_bytes),
        "recipe": ", ".join(f"{component}={scheme}" for component, scheme in manifest.recipe.items()),
        "expert encodings": ", ".join(encodings),
        "format": manifest.format_version,
        "layout": manifest.layout_id,
        "numerics": f"{NUMERICS_ID} (kernels bit-identical across CPUs), float (reference)",
        "source": ", ".join(f"{key} {value}" for key, value in (manifest.source | manifest.versions).items()),
    } | ({"notes": "; ".join(manifest.notes)} if manifest.notes else {})


def _encoding(spec: PackedSpec) -> str:
    """In words, such as "q4 g64" or "q2 g16 s8" (second-level scales)."""
    group = f" g{spec.group}" if spec.group else ""
    return f"{spec.encoding}{group}{' s8' if spec.meta == 'u8' else ''}"


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
