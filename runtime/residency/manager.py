"""Which of a host's experts are in memory: the accounts, and the decisions. Pure: no threads, no clock, no I/O.

    ABSENT -> LOADING -> RESIDENT -> EVICTING -> ABSENT
    LOADING -> ABSENT (failed, or given up)

Events come in (``need``, ``release``, ``used``, ``hint``, ``replicate``, ``loaded``, ``failed``, ``evicted``);
``next_load`` says what to load next, into which slot, in place of what. A slot belongs to at most one expert from the
beginning of its load, so that the budget, which is the number of slots, holds at every moment.

A prediction takes the place of what is worth least, but once: if its layer contradicts it in mid-load, the slot is kept
free for the next prediction or demand. (The paper keeps what it loads speculatively apart from the cache, section 3.2.)

Experts are numbers 0 to N-1, in layer order. A client *claims* the experts it needs: they are loaded first, and never
evicted before it releases them or needs others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from moray.runtime.residency.policy import Policy


class State(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    EVICTING = "evicting"  # its slot is another's already; readers have not been told yet


_OUT = (State.ABSENT, State.EVICTING)


class Urgency(IntEnum):
    """Lower goes first."""

    DEMAND = 0  # a layer waits
    HINT = 1  # predicted
    REPLICA = 2  # hot: kept here too, as other hosts do
    FILL = 3  # memory is free


@dataclass(frozen=True, slots=True)
class Load:
    """Read ``expert`` into ``slot``. If there is a ``victim``, tell readers first that it is gone, then ``evicted``."""

    expert: int
    slot: int
    victim: int | None
    urgency: Urgency


@dataclass(slots=True)
class ResidencyStats:
    """Counts since the start, of experts."""

    demand_loads: int = 0
    hint_loads: int = 0
    replica_loads: int = 0
    fill_loads: int = 0
    evictions: int = 0


class ResidencyManager:
    """One host's residency. Not thread-safe."""

    def __init__(self, layer_of: Sequence[int], num_slots: int, policy: Policy) -> None:
        """``layer_of`` [N]: each expert's layer."""
        self._layer_of, self._num_slots, self._policy = list(layer_of), num_slots, policy
        self._state = [State.ABSENT] * len(layer_of)
        self._slot: dict[int, int] = {}  # of LOADING and RESIDENT experts
        self._urgency: dict[int, Urgency] = {}  # of LOADING experts
        self._given_up: set[int] = set()  # LOADING experts whose load should stop
        self._free = list(range(num_slots))[::-1]
        self._staging: list[int] = []  # free too, but not to be filled: given back by predictions
        self._claims: dict[str, set[int]] = {}
        self._claimed: dict[int, int] = {}  # by how many clients, of those that are claimed
        self._demands: list[int] = []
        self._hints: dict[int, bool] = {}  # in order; whether it is a prediction
        self._replicas: dict[int, None] = {}  # in order
        self._unused_hints: set[int] = set()  # loaded or loading because predicted, not yet used
        self._contradicted: dict[int, None] = {}  # of these, those that their layer did not need when it came
        self._fills = self._in_turn(list(layer_of))[::-1]
        self._failed: set[int] = set()  # left alone until somebody needs them again
        self.stats = ResidencyStats()

    def assign(self, experts: Sequence[int]) -> None:
        """Free memory is filled with these alone, in this order. What could not be loaded before is tried again."""
        self._fills = list(experts)[::-1]
        self._failed.clear()

    @property
    def wants_to_fill(self) -> bool:
        """Whether there is free memory, and something left to fill it with."""
        return bool(self._free) and any(self._is_loadable(e) for e in self._fills)

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert: then nothing is ever evicted."""
        return self._num_slots >= len(self._state)

    @property
    def has_demand(self) -> bool:
        """Whether a client waits for something."""
        return bool(self._demands) or Urgency.DEMAND in self._urgency.values()

    @property
    def is_asked(self) -> bool:
        """Whether something waits for its load to begin, perhaps for a slot."""
        return bool(self._demands or self._hints or self._replicas)

    @property
    def num_resident(self) -> int:
        return sum(state is State.RESIDENT for state in self._state)

    def state(self, expert: int) -> State:
        return self._state[expert]

    def urgency(self, expert: int) -> Urgency:
        """Of an expert that is being loaded; it rises when a client comes to need it."""
        return self._urgency[expert]

    def is_given_up(self, expert: int) -> bool:
        """Whether the load of a LOADING expert should be stopped: report it ``failed``."""
        return expert in self._given_up

    def adopt(self, expert: int, slot: int) -> None:
        """At the start: a slot kept from before a restart holds this expert."""
        self._free.remove(slot)
        self._slot[expert], self._state[expert] = slot, State.RESIDENT
        self._policy.loaded(expert)

    def need(self, client: str, experts: Sequence[int]) -> None:
        """A client's layer needs these, and no longer what it needed before. Predictions of others are dropped."""
        self._claim(client, set(experts))
        self._fills += self._failed.intersection(experts)
        self._failed.difference_update(experts)
        for e in self._urgency:
            if e in self._claimed:
                self._promote(e)
        self._contradict(experts)
        waiting = [e for e in self._demands if e in self._claimed and e not in experts]
        self._demands = waiting + [e for e in experts if self._state[e] in _OUT]

    def claim(self, client: str, experts: Sequence[int]) -> None:
        """A client uses these, which are RESIDENT, and no longer what it claimed before: ``need`` without a load."""
        assert all(self._state[e] is State.RESIDENT for e in experts)
        self._claim(client, set(experts))

    def release(self, client: str, experts: Iterable[int]) -> None:
        """A client is done with some of what it needed."""
        self._claim(client, self._claims.get(client, set()) - set(experts))

    def drop_client(self, client: str) -> None:
        self._claim(client, set())

    def used(self, experts: list[int]) -> None:
        """A layer call used these. Predictions of others are dropped."""
        self._policy.used(experts)
        self._contradict(experts)
        for e in experts:
            self._contradicted.pop(e, None)
            self._unused_hints.discard(e)

    def hint(self, experts: Sequence[int], *, is_prediction: bool = True) -> list[int]:
        """These are predicted to be needed, likeliest first; or somebody will ask for them again, whatever others need.

        Returns those that a load was not asked for already.
        """
        new = [e for e in experts if self._is_loadable(e) and e not in self._hints]
        self._hints.update(dict.fromkeys(new, is_prediction))
        if not is_prediction:
            self._hints.update(dict.fromkeys(self._hints.keys() & set(experts), False))
            self._unused_hints.difference_update(experts)
        for e in experts:
            self._given_up.discard(e)
            self._contradicted.pop(e, None)
        return new

    def replicate(self, experts: Sequence[int]) -> None:
        """These should be here in place of what is worth less, the hottest first; what was asked before no longer."""
        self._replicas = {e: None for e in experts if self._is_loadable(e)}

    @property
    def num_replicas_due(self) -> int:
        """How many experts are still to be loaded for ``replicate``."""
        return len(self._replicas)

    def next_load(
        self,
        least: Urgency = Urgency.FILL,
        admit: Callable[[int], bool] = lambda expert: True,
        *,
        may_replicate: bool = True,
    ) -> Load | None:
        """What to load now, if something of urgency ``least`` or a higher one waits and there is a slot for it.

        ``admit``: whether an expert that is hinted at may take the place of another.
        """
        self._demands = [e for e in self._demands if e in self._claimed and self._state[e] in _OUT]
        demand = next((e for e in self._demands if self._state[e] is State.ABSENT), None)
        if demand is not None:
            load = self._begin(demand, Urgency.DEMAND)
            if load is not None:
                self._demands.remove(demand)  # if it fails, until somebody asks for it again
            return load
        if least >= Urgency.HINT:
            for e in list(self._hints):
                is_prediction = self._hints.pop(e)
                if self._is_loadable(e) and (self._free or admit(e)):
                    load = self._begin(e, Urgency.HINT)
                    if load is not None:
                        if is_prediction:
                            self._unused_hints.add(e)
                        return load
        if least >= Urgency.REPLICA and may_replicate:
            for e in list(self._replicas):
                del self._replicas[e]
                if self._is_loadable(e):
                    load = self._begin(e, Urgency.REPLICA)
                    if load is not None:
                        return load
        if least >= Urgency.FILL and self._free:
            while self._fills:
                e = self._fills.pop()
                if self._is_loadable(e):
                    return self._begin(e, Urgency.FILL)
        return None

    def evicted(self, expert: int) -> None:
        """Readers know that a load's victim is gone."""
        assert self._state[expert] is State.EVICTING
        self._state[expert] = State.ABSENT

    def loaded(self, expert: int) -> None:
        """A load came to its end."""
        assert self._state[expert] is State.LOADING
        self._state[expert] = State.RESIDENT
        self._given_up.discard(expert)
        del self._urgency[expert]

    def failed(self, expert: int) -> None:
        """A load was stopped, or went wrong; its slot is free."""
        assert self._state[expert] is State.LOADING
        self._state[expert] = State.ABSENT
        if expert in self._given_up:  # nothing is wrong with it: its turn comes again
            self._given_up.discard(expert)
            if self._urgency[expert] is Urgency.REPLICA:
                self._replicas[expert] = None
            else:
                self._fills.append(expert)
        else:
            self._failed.add(expert)
        del self._urgency[expert]
        is_staging = expert in self._unused_hints and not self.holds_all
        (self._staging if is_staging else self._free).append(self._slot.pop(expert))
        self._policy.evicted(expert)
        self._waste(expert)

    def validate(self) -> None:
        """Raises AssertionError unless the accounts agree with each other."""
        slots = [*self._slot.values(), *self._free, *self._staging]
        assert sorted(slots) == list(range(self._num_slots)), "a slot belongs to two, or to none"
        for e, state in enumerate(self._state):
            assert (e in self._slot) == (state in (State.LOADING, State.RESIDENT)), f"{e} is {state}"
            assert (e in self._urgency) == (state is State.LOADING), f"{e} is {state}"
        assert self._given_up <= self._urgency.keys()
        claims = Counter(e for claimed in self._claims.values() for e in claimed)
        assert claims == self._claimed, "claims do not add up"
        assert all(self._state[e] in (State.LOADING, State.RESIDENT) for e in self._unused_hints)
        assert self._contradicted.keys() <= self._unused_hints

    def _in_turn(self, layer_of: list[int]) -> list[int]:
        """In which order to fill: layer by layer if there is room for all, else one expert of each layer in turn."""
        if self.holds_all:
            return list(range(len(layer_of)))
        seen: Counter[int] = Counter()
        ranks = []
        for e, layer in enumerate(layer_of):
            ranks.append((seen[layer], layer, e))
            seen[layer] += 1
        return [e for _, _, e in sorted(ranks)]

    def _is_loadable(self, expert: int) -> bool:
        """Whether it may be loaded though nobody waits for it."""
        return self._state[expert] is State.ABSENT and expert not in self._failed

    def _claim(self, client: str, experts: set[int]) -> None:
        before = self._claims.pop(client, set())
        for e in before - experts:
            self._claimed[e] -= 1
            if not self._claimed[e]:
                del self._claimed[e]
        for e in experts - before:
            self._claimed[e] = self._claimed.get(e, 0) + 1
        if experts:
            self._claims[client] = experts

    def _contradict(self, experts: Sequence[int]) -> None:
        """A layer needs these: what else was predicted for it is not loaded, or takes the place of nothing better."""
        layers = {self._layer_of[e] for e in experts}
        for e in [e for e, is_prediction in self._hints.items() if is_prediction and self._layer_of[e] in layers]:
            del self._hints[e]
        wrong = [e for e in self._unused_hints if self._layer_of[e] in layers and e not in experts]
        self._given_up.update(e for e in wrong if self._state[e] is State.LOADING)
        self._contradicted |= dict.fromkeys(wrong)

    def _promote(self, expert: int) -> None:
        self._given_up.discard(expert)
        self._contradicted.pop(expert, None)
        self._unused_hints.discard(expert)
        self._urgency[expert] = Urgency.DEMAND

    def _begin(self, expert: int, urgency: Urgency) -> Load | None:
        first, second = (self._staging, self._free) if urgency is Urgency.HINT else (self._free, self._staging)
        free, victim = first or second, None
        if free:
            slot = free.pop()
        else:
            victim = self._victim(expert, urgency)
            if victim is None:
                return None
            slot = self._slot.pop(victim)
            self._state[victim] = State.EVICTING
            self._policy.evicted(victim)
            self._waste(victim)
            self.stats.evictions += 1
        self._state[expert], self._slot[expert], self._urgency[expert] = State.LOADING, slot, urgency
        self._hints.pop(expert, None)
        self._policy.loaded(expert)
        self._count(expert, urgency)
        return Load(expert, slot, victim, urgency)

    def _victim(self, incoming: int, urgency: Urgency) -> int | None:
        def may_evict(expert: int) -> bool:
            return self._state[expert] is State.RESIDENT and expert not in self._claimed

        victim = next((e for e in self._contradicted if may_evict(e)), None)
        if victim is None:
            victim = self._policy.victim(incoming, may_evict)
        if victim is None and urgency is Urgency.DEMAND:
            # Every slot is claimed, or is being filled for a prediction: that one must wait.
            self._given_up.update(e for e, its in self._urgency.items() if its is not Urgency.DEMAND)
        return victim

    def _count(self, expert: int, urgency: Urgency) -> None:
        if urgency is Urgency.HINT:
            self.stats.hint_loads += 1
        elif urgency is Urgency.DEMAND:
            self.stats.demand_loads += 1
        elif urgency is Urgency.REPLICA:
            self.stats.replica_loads += 1
        else:
            self.stats.fill_loads += 1

    def _waste(self, expert: int) -> None:
        self._contradicted.pop(expert, None)
        self._unused_hints.discard(expert)
