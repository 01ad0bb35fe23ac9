"""How well prefetch n layers ahead would have known what was needed."""

from __future__ import annotations

from moray.runtime.trace.format import Trace


def recall_by_distance(trace: Trace) -> dict[int, float]:
    """Distance in layers -> share of the used experts that were predicted, over decode calls.

    Only calls that something was predicted for count. A prediction is cut to as many experts, the most likely first,
    as the call used: predicting all experts is no merit.
    """
    steps, layers, starts = trace.steps_C.tolist(), trace.layers_C.tolist(), trace.starts.tolist()
    call_at = {at: call for call, at in enumerate(zip(steps, layers, strict=True))}
    experts, is_prefill = trace.experts_U.tolist(), trace.is_prefill_C.tolist()
    recalls = {}
    for distance, (guess_starts_C, guesses) in trace.predicted.items():
        bounds, values = guess_starts_C.tolist(), guesses.tolist()
        num_found = num_used = 0
        for call, (step, layer) in enumerate(zip(steps, layers, strict=True)):
            target = call_at.get((step, layer + distance))
            guess = values[bounds[call] : bounds[call + 1]]
            if target is None or not guess or is_prefill[target]:
                continue
            used = experts[starts[target] : starts[target + 1]]
            num_found += len(set(used) & set(guess[: len(used)]))
            num_used += len(used)
        if num_used:
            recalls[distance] = num_found / num_used
    return recalls
