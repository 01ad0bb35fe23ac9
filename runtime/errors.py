"""Every error moray raises on purpose.

MorayError
├── InputError                 what the user gave is wrong (exit code 2)
│   ├── CheckpointError        a checkpoint directory, or a tensor in it
│   ├── HubError               a model hub: missing, gated, not reachable, or it sends other bytes
│   ├── UnsupportedModelError  a dense model, or a family without the experts interface
│   ├── RecipeError            an unknown quantization recipe
│   ├── ConfigError            an unknown key or a wrong value in configuration
│   ├── StoreError             a store that is missing, incomplete, newer or corrupt
│   │   └── CorruptShardError  a shard whose checksum fails
│   ├── ResourceError          not enough memory or disk: says needed and free
│   ├── RequestError           a generation request that cannot be served
│   ├── EvaluationError        a text that cannot be evaluated on, or stores that cannot be compared
│   └── TraceError             a trace that is missing, newer or damaged, or traces that do not go together
├── ClusterError               Ray or a node is not there
│   ├── ActorLostError         an actor's process ended; it may be back soon
│   └── HostLostError          an expert host does not answer
└── ProtocolError              a data-plane peer sent something we do not accept

A message says what was found, what was expected and what to do, in one line.
"""

from __future__ import annotations


class MorayError(Exception):
    """Base of all errors raised on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries through Ray: keep them picklable whatever their __init__.
        return (_rebuild, (type(self), str(self)))


def _rebuild(cls: type[MorayError], message: str) -> MorayError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    return error


class InputError(MorayError):
    """What the user gave is wrong. The command line exits with code 2."""


class CheckpointError(InputError):
    """A checkpoint directory, file or tensor cannot be used."""


class HubError(InputError):
    """A model hub does not give what was asked for."""


class UnsupportedModelError(InputError):
    """The model has no routed experts, or its family is not routed through the experts interface."""


class RecipeError(InputError):
    """A quantization recipe is unknown or malformed."""


class ConfigError(InputError):
    """A configuration key is unknown or its value is wrong."""


class StoreError(InputError):
    """A store is missing, incomplete, newer than this version or damaged."""


class CorruptShardError(StoreError):
    """A shard's bytes do not match its checksum."""


class ResourceError(InputError):
    """Memory or disk is too small. The message gives needed and free bytes."""


class RequestError(InputError):
    """A generation request cannot be served as asked."""


class EvaluationError(InputError):
    """A text cannot be evaluated on, or stores cannot be compared."""


class TraceError(InputError):
    """A trace is missing, newer than this version or damaged, or traces do not go together."""


class ClusterError(MorayError):
    """Ray, a node or an actor is not there."""


class ActorLostError(ClusterError):
    """An actor's process ended; supervision may bring it back."""


class HostLostError(ClusterError):
    """An expert host does not answer."""


class ProtocolError(MorayError):
    """A data-plane peer sent something that is not accepted."""
