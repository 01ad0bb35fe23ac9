"""Driving a step loop by hand, and what its events say."""

from __future__ import annotations

from moray.runtime.generation.request import Finished, GenerationRequest, TokenEvent
from moray.runtime.generation.step_loop import StepLoop

PROMPTS = [
    "import os\nimport sys\n\n\ndef main(argv=None):\n",
    "def read(path):\n    with open(path) as file:\n",
    "class Node:\n    def __init__(self",
    "for i in range(",
    "x",
    "    return [item for item in items if",
    '"""Return the',
    "try:\n    import json\nexcept ImportError:\n",
    "a = 1\nb = 2\nc =",
    "raise ValueError(",
    "世界 🙂 é",
]


def drive(loop: StepLoop, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    """Run requests to their ends; the events of each."""
    for request in requests:
        loop.add(request)
    events: dict[str, list[TokenEvent]] = {}
    while not loop.is_idle:
        for event in loop.step():
            events.setdefault(event.request_id, []).append(event)
        check_bytes(loop)
    return events


def check_bytes(loop: StepLoop) -> None:
    """Caches are no larger than their accounts say, which are within the limit."""
    loop.validate()
    for kv in loop.caches if loop.stats().kv_limit_bytes is not None else ():
        layers = [layer for layer in kv.cache.layers if layer.is_initialized]
        assert sum(layer._keys.nbytes + layer._values.nbytes for layer in layers) <= kv.reserved_bytes


def run(loop: StepLoop, request: GenerationRequest) -> list[TokenEvent]:
    return drive(loop, request)[request.request_id]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def end_of(events: list[TokenEvent]) -> Finished:
    assert all(event.finished is None for event in events[:-1])
    assert events[-1].finished is not None
    return events[-1].finished
