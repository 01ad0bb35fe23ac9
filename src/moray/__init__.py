"""moray (MoE on Ray): Mixture-of-Experts models with their experts outside the compute process.

Importing this package imports neither torch nor ray: names load on first use.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["Completion", "Engine", "Message", "__version__", "launch"]

if TYPE_CHECKING:
    from moray.deploy.engine import Completion, Engine, Message, launch
else:  # hidden from type checkers, or they would accept any name

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in __all__:
            return getattr(import_module("moray.deploy.engine"), name)
        if name in {"actors", "cluster", "deploy", "runtime"}:
            return import_module(f"moray.{name}")
        raise AttributeError(f"module 'moray' has no attribute {name!r}")
