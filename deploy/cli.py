"""The command line: ``moray COMMAND --help`` shows an example for each."""

from __future__ import annotations

import os

import typer

from moray.deploy.commands import cluster, generate, machine, measure, serve, store, trace

app = typer.Typer(
    help="Run Mixture-of-Experts language models on Ray, their experts in shared memory beside the compute process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (store.top, generate.top, serve.top, measure.top, machine.top):
    app.add_typer(commands)
app.add_typer(measure.bench, name="bench")
app.add_typer(store.tools, name="store")
app.add_typer(serve.keys, name="api-keys")
app.add_typer(cluster.group, name="cluster")
app.add_typer(trace.group, name="trace")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
