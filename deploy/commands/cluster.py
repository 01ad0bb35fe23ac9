"""``moray cluster``: the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moray.deploy.commands.registry import JsonOption, command, console
from moray.runtime.errors import ConfigError

AddressOption = Annotated[
    str | None,
    typer.Option(help="This machine's IP address in the cluster's network; none: the one that leads there."),
]
NameOption = Annotated[str | None, typer.Option(help="The node's name, one for each machine; none: its address.")]
TlsOption = Annotated[
    Path | None, typer.Option(help="Folder of certificates made by `moray cluster keys --tls`; none: no TLS.")
]
_TLS_FOLDER = Path.home() / ".config" / "moray" / "tls"


group = typer.Typer(help="Make a Ray cluster of a few machines, and look at it.", no_args_is_help=True)


@command(group, "moray cluster keys --tls 10.0.0.1 --tls 10.0.0.2")
def keys(
    tls: Annotated[
        list[str] | None,
        typer.Option(help="Also make TLS certificates, for the node at this IP address; may be given again."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where certificates are kept.")] = _TLS_FOLDER,
    as_json: JsonOption = False,
) -> None:
    """Make the secrets of a cluster, on its head node. What exists stays. Prints what to copy to the others."""
    from moray.cluster.node_record import token_path
    from moray.deploy.cluster.keys import make_certificates, make_token

    token = token_path()
    is_new = make_token(token)
    certificates = make_certificates(folder, tls) if tls else []
    if as_json:
        document = {"token": str(token), "is_new": is_new, "certificates": [str(file) for file in certificates]}
        typer.echo(json.dumps(document))
        return
    console.print(f"{'made' if is_new else 'kept'} Ray's token {token}; copy it to the same place on every machine:")
    console.print(f"  ssh MACHINE mkdir -p -m 700 {token.parent} && scp -p {token} MACHINE:{token}", soft_wrap=True)
    if certificates:
        console.print(f"certificates for TLS in {folder}; copy ca.pem and a node's own two files to that node:")
        for address in tls or []:
            files = ",".join(("ca.pem", f"node-{address}.pem", f"node-{address}-key.pem"))
            console.print(f"  scp -p {folder}/{{{files}}} {address}:{folder}/", soft_wrap=True)


@command(group, "moray cluster up --address 10.0.0.1")
def up(
    address: AddressOption = None,
    port: Annotated[int, typer.Option(help="That other nodes join at.", min=1, max=65535)] = 6379,
    role: Annotated[str, typer.Option(help="compute: attention and the KV cache are here.")] = "compute",
    name: NameOption = None,
    tls: TlsOption = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Start Ray's dashboard at 127.0.0.1:8265, for `serve deploy`.")
    ] = False,
) -> None:
    """Start a cluster with this machine as its head."""
    from moray.deploy.cluster.node import route_to, start_head

    record = start_head(address or route_to("192.0.2.1:9"), port, _role(role), name, tls, has_dashboard=dashboard)
    console.print(f"node {record.name} is up. On the other machines:")
    console.print(f"  moray cluster join {record.gcs_address}{' --tls FOLDER' if tls else ''}", soft_wrap=True)
    console.print("then, here:")
    console.print(f"  moray generate 'def main(' --address {record.gcs_address}", soft_wrap=True)


@command(group, "moray cluster join 10.0.0.1:6379")
def join(
    head: Annotated[str, typer.Argument(help="HOST:PORT of the head node.")],
    address: AddressOption = None,
    role: Annotated[str, typer.Option(help="host: holds experts, and computes them.")] = "host",
    name: NameOption = None,
    tls: TlsOption = None,
) -> None:
    """Join this machine to a cluster; refused if the head runs other versions."""
    from moray.deploy.cluster.node import start_worker

    record = start_worker(head, address, _role(role), name, tls)
    console.print(f"node {record.name} ({record.role}) has joined the cluster at {record.gcs_address}")


@command(group, "moray cluster status --json")
def status(
    head: Annotated[
        str | None, typer.Argument(help="HOST:PORT of the head node; none: of this machine's cluster.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show nodes, and what engines make of them."""
    from moray.cluster.node_record import read_record
    from moray.deploy.cluster.status import as_document, cluster_status, print_status

    record = read_record()
    address = head or (record.gcs_address if record is not None else None)
    if address is None:
        raise ConfigError("this machine is in no cluster of `moray cluster`; give HOST:PORT of a head node")
    found = cluster_status(address)
    if as_json:
        typer.echo(json.dumps(as_document(found)))
    else:
        print_status(found, console)


@command(group, "moray cluster down")
def down() -> None:
    """End the node that `up` or `join` started on this machine, and nothing else."""
    from moray.deploy.cluster.node import stop_node

    record = stop_node()
    console.print(f"node {record.name} is down" if record else "no node of `moray cluster` runs on this machine")


def _role(role: str) -> str:
    if role not in ("compute", "host"):
        raise ConfigError(f"role is {role!r}, expected compute or host")
    return role
