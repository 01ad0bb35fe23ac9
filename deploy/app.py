"""The Ray Serve application: ``serve run moray.deploy.app:build store=./mixtral-hqq4``."""

from typing import TYPE_CHECKING

from moray.deploy.serving.args import ServeArgs  # Serve reads the annotation of ``build``

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: ServeArgs) -> "Application":
    """An OpenAI-compatible server and the engine behind it. ``ServeArgs`` describes the arguments."""
    from moray.deploy.serving.ingress import make_application

    return make_application(args)
