"""What the page shows of the engine, as JSON: small, for it is asked for every second."""

from __future__ import annotations

from base64 import b64encode

from pydantic import BaseModel

from moray.actors.messages import EngineView


class PlaceState(BaseModel):
    """Where experts can be."""

    tier: str
    name: str
    node: str


class LayerState(BaseModel):
    """base64 of one byte per expert: index into ``places``, and recent use from 0 to 255."""

    place: str
    recent: str


class EngineState(BaseModel):
    """Answer of GET /state. Rates are differences of counts between two answers of the same ``num_restarts``."""

    model: str
    has_chat_template: bool
    time_s: float
    num_restarts: int
    places: list[PlaceState]
    layers: list[LayerState]
    uses: int
    misses: int
    bytes_by_lane: dict[str, int]
    tokens_decoded: int
    prompt_tokens_computed: int
    prompt_tokens_reused: int
    batching: str
    running: int
    waiting: int
    requests: int
    max_requests: int
    kv_reserved_bytes: int
    kv_limit_bytes: int | None

    @classmethod
    def of(cls, view: EngineView, model: str, num_requests: int, max_requests: int) -> EngineState:
        made = view.generation
        return cls(
            model=model,
            has_chat_template=view.has_chat_template,
            time_s=view.time_s,
            num_restarts=view.num_restarts,
            places=[PlaceState(tier=place.tier, name=place.name, node=place.node) for place in view.places],
            layers=[
                LayerState(place=b64encode(tiers).decode(), recent=b64encode(recent).decode())
                for tiers, recent in zip(view.tiers, view.recent, strict=True)
            ],
            uses=view.uses,
            misses=view.misses,
            bytes_by_lane=dict(view.lanes),
            tokens_decoded=made.decode_rows - made.speculated + made.speculated_accepted,
            prompt_tokens_computed=made.prompt_tokens_computed,
            prompt_tokens_reused=made.prompt_tokens_reused,
            batching=made.batching,
            running=made.running,
            waiting=made.waiting,
            requests=num_requests,
            max_requests=max_requests,
            kv_reserved_bytes=made.kv_reserved_bytes,
            kv_limit_bytes=made.kv_limit_bytes,
        )
