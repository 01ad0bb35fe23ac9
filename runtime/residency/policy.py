"""What a cache policy is: it suggests which expert to evict; the manager decides and accounts.

Experts are numbers here: 0 to N-1, a host's experts in layer order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Policy(Protocol):
    """Suggests what to evict. Called under the manager's lock, in the order in which things happen.

    Every call must take microseconds at N = 10,000: a layer waits for it.
    """

    def loaded(self, expert: int) -> None:
        """It is in memory from now on, or will be: a load that has begun counts."""
        ...

    def evicted(self, expert: int) -> None:
        """It is no longer in memory, or a load of it was given up."""
        ...

    def used(self, experts: list[int]) -> None:
        """A layer call used these (one layer, each once), whether they were in memory or had to be loaded.

        Calls come in the order of the layer calls; a call for experts that were just loaded follows their ``loaded``.
        """
        ...

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        """The expert to give up for ``incoming``; None if ``may_evict`` refuses all that are in memory."""
        ...
