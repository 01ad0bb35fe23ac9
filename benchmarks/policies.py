"""Cache policies on recorded traces: hit rates, Belady's bound, and whether the choice on other texts was right.

    python benchmarks/policies.py tests/data/traces/*.msgpack
    python benchmarks/policies.py a.trace b.trace c.trace --budgets 10 20 50 --half-lives 16 64 256

*hit rate*: of all uses of an expert by a layer call (prefill included), the share that found it in the cache, which is
empty at first. Each trace is held out once: *auto* is the policy with the most hits on the others. *auto / best* is
its hit rate over that of the policy that is best on the trace itself. *uniform*: as many decode calls of the same
layers, the experts of each drawn uniformly at random; there no policy but one that knows the future can do better than
the share of experts that fit.
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import numpy as np
from common import describe_machine, print_table

from moray.runtime.residency.policies import POLICIES
from moray.runtime.residency.policies.belady import Belady
from moray.runtime.residency.policies.lfu import LFU
from moray.runtime.trace.format import Trace, read_trace
from moray.runtime.trace.simulate import BELADY, best_policy, make_any_policy, replay

Calls = list[list[int]]


def uniform_calls(trace: Trace, seed: int) -> Calls:
    """Decode calls of the layers of ``trace``, of as many experts each as most of its decode calls have."""
    random = np.random.default_rng(seed)
    first = [0, *accumulate(trace.header.num_experts)]
    decode = ~trace.is_prefill_C
    width = int(np.median(np.diff(trace.starts)[decode]))
    return [
        sorted(first[layer] + random.choice(trace.header.num_experts[layer], width, replace=False))
        for layer in trace.layers_C[decode].tolist()
    ]


def hit_rate(calls: Calls, name: str, trace: Trace, num_slots: int) -> float:
    policy = make_any_policy(name, trace.header.num_experts, num_slots, calls)
    return 1 - int(replay(calls, policy, num_slots).sum()) / sum(map(len, calls))


def report_hits(texts: dict[str, Trace], budgets: dict[str, int]) -> None:
    rows, worst = [], 1.0
    for budget, num_slots in budgets.items():
        for name, trace in texts.items():
            calls = trace.calls()
            rates = {policy: hit_rate(calls, policy, trace, num_slots) for policy in (*POLICIES, BELADY)}
            auto = best_policy([other for other in texts.values() if other is not trace], num_slots)
            best = max(rates[policy] for policy in POLICIES)
            ratio = rates[auto] / best if best else 1.0
            worst = min(worst, ratio)
            rows.append([f"{budget} {name}", *(f"{100 * rate:.1f}" for rate in rates.values()), auto, f"{ratio:.3f}"])
        trace = next(iter(texts.values()))
        calls = uniform_calls(trace, seed=0)
        rates = {policy: hit_rate(calls, policy, trace, num_slots) for policy in (*POLICIES, BELADY)}
        rows.append([f"{budget} uniform", *(f"{100 * rate:.1f}" for rate in rates.values()), "", ""])
    print_table(["hit rate, %, with", *POLICIES, BELADY, "auto", "auto / best"], rows)
    print(f"\nauto, chosen on the other texts, over the best policy: {worst:.3f} at worst (0.95 is wanted)\n")


def report_half_lives(texts: dict[str, Trace], budgets: dict[str, int], half_lives: list[float]) -> None:
    """Of decayed LFU, over all texts."""
    rows = []
    for half_life in half_lives:
        rates = []
        for num_slots in budgets.values():
            missed = used = 0
            for trace in texts.values():
                calls = trace.calls()
                missed += int(replay(calls, LFU(trace.header.num_experts, half_life), num_slots).sum())
                used += sum(map(len, calls))
            rates.append(f"{100 * (1 - missed / used):.1f}")
        rows.append([f"{half_life:g} tokens", *rates])
    print_table(["half-life of lfu: hit rate, %", *budgets], rows)
    print()


def report_cost(num_layers: int = 80, num_experts: int = 128, top_k: int = 8, tokens: int = 40) -> None:
    """What bookkeeping takes, at 10,240 experts of which a quarter fits, used uniformly at random (hits are rare)."""
    layers = [num_experts] * num_layers
    random = np.random.default_rng(0)
    calls = [
        sorted((num_experts * layer + random.choice(num_experts, top_k, replace=False)).tolist())
        for _ in range(tokens)
        for layer in range(num_layers)
    ]
    num_slots = sum(layers) // 4
    rows = []
    for name in (*POLICIES, BELADY):
        policy = Belady(calls, num_slots) if name == BELADY else make_any_policy(name, layers, num_slots, calls)
        started = perf_counter()
        missed = int(replay(calls, policy, num_slots).sum())
        spent = perf_counter() - started
        rows.append([name, f"{1e6 * spent / len(calls):.1f}", f"{missed / len(calls):.1f}"])
    print_table([f"replaying a call of {top_k} of {sum(layers)} experts", "us a call", "evictions a call"], rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="of one model, at least two")
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 40, 60, 80], help="%% of all experts")
    parser.add_argument("--half-lives", type=float, nargs="+", default=[4, 16, 32, 64, 128, 512], help="tokens")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    texts = {path.stem: read_trace(path) for path in arguments.traces}
    if len(texts) < 2:
        raise SystemExit("one trace cannot be held out; name at least two")
    total = sum(next(iter(texts.values())).header.num_experts)
    budgets = {f"{percent} %": max(1, percent * total // 100) for percent in arguments.budgets}
    print(f"{describe_machine()}\n")
    report_hits(texts, budgets)
    report_half_lives(texts, budgets, arguments.half_lives)
    report_cost()


if __name__ == "__main__":
    main()
