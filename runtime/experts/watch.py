"""What happens around a layer call besides its computing: predictions on the way in, records on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from moray.runtime.experts.source import ExpertSource
from moray.runtime.model.families import expert_modules
from moray.runtime.prefetch.predictor import Predictor
from moray.runtime.prefetch.replayed import ReplayedPredictor, replayed_file
from moray.runtime.prefetch.trial import PrefetchTrial
from moray.runtime.store.store import Store
from moray.runtime.trace.format import TraceHeader
from moray.runtime.trace.recorder import TraceRecorder
from moray.runtime.trace.traffic import TrafficRecorder

# MoE layers ahead. What is predicted earlier is right less often, and no less late: the disk is what takes the time.
_HINTED_AHEAD = 1
_TRACED_AHEAD = 2


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What to predict and record."""

    hints: bool = False
    tries_prefetch: bool = False  # hint only while that makes steps shorter
    trace: str | None = None  # file to record into
    num_slots: int | None = None  # of all hosts together, and their policy: noted in the trace
    policy: str = ""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer's experts. ``experts`` ascend; ``tokens`` is aligned with them; seconds."""

    layer: int
    num_tokens: int
    experts: Sequence[int]
    tokens: Sequence[int]
    missed: Sequence[int]
    missed_bytes: int
    wait_s: float
    compute_s: float


class LayerWatch:
    """Predicts and records for all layers of a model. Used by the step loop's thread."""

    def __init__(
        self,
        source: ExpertSource,
        predictor: Predictor | ReplayedPredictor | None = None,
        trace: TraceRecorder | None = None,
        traffic: TrafficRecorder | None = None,
        trial: PrefetchTrial | None = None,
    ) -> None:
        self._source, self._predictor, self.trace, self.traffic = source, predictor, trace, traffic
        self._trial = trial
        self._step, self._last_layer, self._num_tokens, self._step_began_s = -1, -1, 0, 0.0
        self._predicted: dict[int, Sequence[int]] = {}

    @property
    def wants_inputs(self) -> bool:
        """Whether ``before`` and ``after`` must be called for each layer; else ``used`` is enough, any time later."""
        return self.trace is not None or self._wants_hints

    @property
    def _wants_hints(self) -> bool:
        return self._predictor is not None and self._source.wants_hints and (self._trial is None or self._trial.is_on)

    def before(self, layer: int, x_TH: torch.Tensor) -> None:
        """A layer is about to compute on x: hint at what the next ones will need."""
        self._predicted = {}
        wants_hints = self._wants_hints
        if self._predictor is None or not (wants_hints or self.trace is not None):
            return
        for prediction in self._predictor.predict(layer, x_TH):
            experts = prediction.ids.tolist()
            self._predicted[ahead := prediction.layer - layer] = experts
            if wants_hints and ahead <= _HINTED_AHEAD:
                self._source.hint(prediction.layer, experts)

    def after(self, call: LayerCall) -> None:
        """A layer has computed."""
        self.used(call.layer, call.num_tokens, call.experts)
        if self.trace is not None:
            self.trace.record(
                self._step, call.layer, call.num_tokens, call.experts, call.tokens, call.missed, self._predicted,
                call.missed_bytes, int(1e6 * call.wait_s), int(1e6 * call.compute_s),
            )  # fmt: skip

    def used(self, layer: int, num_tokens: int, experts: Sequence[int]) -> None:
        """A layer has used these; layers in their order."""
        if self._source.wants_uses:
            self._source.used(layer, list(experts))
        if self.traffic is not None:
            self.traffic.add(layer, experts)
        if layer <= self._last_layer or self._step < 0:
            self._begin_step(num_tokens)
        self._last_layer = layer

    @property
    def prefetch(self) -> str:
        """Whether hints are given, and why."""
        if self._predictor is None:
            return "off"
        return "on" if self._trial is None else self._trial.reason

    def _begin_step(self, num_tokens: int) -> None:
        now = perf_counter()
        if self._trial is not None and self._step >= 0:
            self._trial.note_step(now - self._step_began_s, self._num_tokens)
        self._step, self._num_tokens, self._step_began_s = self._step + 1, num_tokens, now

    def close(self) -> None:
        """Write what was recorded."""
        for recorder in (self.trace, self.traffic):
            if recorder is not None:
                recorder.close()


def _make_predictor(model: nn.Module, depth: int) -> Predictor | ReplayedPredictor:
    file = replayed_file()
    return Predictor(model, depth) if file is None else ReplayedPredictor(model, file, depth)


def watch_layers(model: nn.Module, store: Store, source: ExpertSource, options: WatchOptions) -> LayerWatch | None:
    """Watch all layers of a model whose experts are bound; None if there is nothing to predict or record.

    Raises TraceError if the trace cannot be begun.
    """
    manifest = store.manifest
    num_experts = tuple(layer.num_experts for layer in manifest.layers)
    ahead = _TRACED_AHEAD if options.trace is not None else _HINTED_AHEAD if options.hints and source.wants_uses else 0
    predictor = _make_predictor(model, ahead) if ahead else None
    traffic = TrafficRecorder(store.fingerprint, num_experts) if source.wants_uses else None
    if predictor is None and traffic is None and options.trace is None:
        return None
    trace = None
    if options.trace is not None:
        header = TraceHeader.of(manifest, store.fingerprint, num_slots=options.num_slots, policy=options.policy)
        trace = TraceRecorder(Path(options.trace), header)
    trial = PrefetchTrial() if options.tries_prefetch and predictor is not None else None
    watch = LayerWatch(source, predictor, trace, traffic, trial)
    for _, module in expert_modules(model):
        module.moray.watch = watch  # type: ignore[union-attr]
    return watch
