"""``moray convert``, ``info``, ``families`` and ``moray store``: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moray.deploy.commands.registry import JsonOption, RevisionOption, StoreArgument, command, console

top = typer.Typer()
tools = typer.Typer(help="Check, rewrite and compare stores.", no_args_is_help=True)


@command(top, "moray convert ./Mixtral-8x7B-v0.1 ./mixtral-hqq4 --recipe experts=hqq3,attention=hqq4:64")
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A local Hugging Face checkpoint (safetensors, 16 or 32 bits), or ORG/NAME on the hub."),
    ],
    store: Annotated[Path, typer.Argument(help="The directory to make.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="One scheme for experts and attention, the other components get hqq8 (none, keep: for all); or "
            "COMPONENT=SCHEME,... Components: experts, attention, shared, dense, embeddings. Schemes: none, hqq8, "
            "hqq4, hqq3, hqq2, each with :GROUP, all but hqq8 also with :GROUP:s8 (second-level scales); keep: codes "
            "of a pre-quantized checkpoint as published. Or a whole recipe: paper-4bit, paper-3bit, paper-2bit."
        ),
    ] = "hqq4",
    lora: Annotated[
        list[Path] | None, typer.Option(help="A PEFT LoRA adapter to merge; may be given again, merged in this order.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that quantize; none: one for each core.")] = None,
    revision: RevisionOption = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Of a hub's model: delete each file when it is converted, keep no checkpoint."),
    ] = False,
) -> None:
    """Convert a checkpoint into a store. Run again after an interruption, it resumes."""
    from moray.deploy.store_commands import convert_store

    convert_store(checkpoint, store, recipe, workers, console, lora=lora or [], revision=revision, stream=stream)


@command(top, "moray info ./mixtral-hqq4 --verify")
def info(
    store: StoreArgument = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a store holds."""
    from moray.deploy.store_commands import show_store

    show_store(store, verify=verify, as_json=as_json, console=console)


@command(top, "moray families --json")
def families(as_json: JsonOption = False) -> None:
    """List the model families that can be converted and run, found in the installed transformers."""
    from moray.runtime.model.lean_imports import import_lean

    import_lean()
    from moray.deploy.families import show_families

    show_families(as_json=as_json, console=console)


@command(tools, "moray store verify ./mixtral-hqq4", "verify")
def store_verify(store: Annotated[Path, typer.Argument(help="A store.")], as_json: JsonOption = False) -> None:
    """Read every byte; say what is damaged and what repairs it. Exits with 2 if anything is."""
    from moray.deploy.store_tools import verify_store

    verify_store(store, console, as_json=as_json)


@command(tools, "moray store repack ./mixtral-hqq4 /mnt/mixtral-hqq4 --file-size 4GiB", "repack")
def store_repack(
    store: Annotated[Path, typer.Argument(help="A store.")],
    target: Annotated[
        Path | None, typer.Argument(help="A new directory; none: only the format, the receipt and left-over files.")
    ] = None,
    file_size: Annotated[
        str | None, typer.Option(help="Most bytes of a file of experts, e.g. 4GiB; none: one file a MoE layer.")
    ] = None,
) -> None:
    """Write a store in the present format, or into other files. No weight is changed."""
    from moray.deploy.store_tools import repack_store

    repack_store(store, target, file_size, console)


@command(tools, "moray store sync 192.168.1.10:7420 ./mixtral-hqq4 --part 1/2 --keys ./moray.keys", "sync")
def store_sync(
    source: Annotated[str, typer.Argument(help="A store's directory, or HOST:PORT of a `moray store serve`.")],
    store: Annotated[Path, typer.Argument(help="The directory to make or to complete.")],
    experts: Annotated[Path | None, typer.Option(help="Only these: a JSON file, a list of [layer, expert].")] = None,
    layers: Annotated[str | None, typer.Option(help="Only those of these MoE layers, e.g. 0-15,20.")] = None,
    part: Annotated[str | None, typer.Option(help="Only i/n of each layer's, e.g. 1/2.")] = None,
    keys: Annotated[Path | None, typer.Option(help="The key file that the serving side has too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look, and bring nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring what a store lacks or has damaged, all or a part of it. Run again after an interruption, it resumes.

    Every byte is checked, of what comes and of what is there; nothing is deleted. A store with a part of its experts
    works where other hosts have the rest.
    """
    from moray.deploy.store_sync import selection, sync_stores

    wanted = selection(experts, layers, part)
    sync_stores(source, store, wanted, keys, console, dry_run=dry_run, as_json=as_json)


@command(tools, "moray store keys ./moray.keys", "keys")
def store_keys(file: Annotated[Path, typer.Argument(help="A new file.")]) -> None:
    """Make the key file of `moray store serve` and `moray store sync`; copy it to the other machine."""
    from moray.cluster.keys import KeyPair, write_keys

    write_keys(file, KeyPair.make())
    console.print(f"made {file}; copy it to every machine that may read a store:", soft_wrap=True)
    console.print(f"  scp -p {file} MACHINE:{file}", soft_wrap=True)


@command(tools, "moray store serve ./mixtral-hqq4 --listen 192.168.1.10:7420 --keys ./moray.keys", "serve")
def store_serve(
    store: Annotated[Path, typer.Argument(help="A store, whole or a part of one.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT of this machine.")],
    keys: Annotated[Path, typer.Option(help="A key file; who has a copy of it may read the store, encrypted.")],
) -> None:
    """Let other machines copy a store with `moray store sync`, until Ctrl-C."""
    from moray.deploy.store_sync import serve_store

    serve_store(store, listen, keys, console)


@command(tools, "moray store diff ./mixtral-hqq4 ./mixtral-none", "diff")
def store_diff(
    store: Annotated[Path, typer.Argument(help="A store.")],
    other: Annotated[Path, typer.Argument(help="A store to compare with it.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two stores: what they were made from, and their weights. Exits with 1 if weights differ."""
    from moray.deploy.store_tools import diff_stores

    if not diff_stores(store, other, console, as_json=as_json).is_empty:
        raise typer.Exit(1)
