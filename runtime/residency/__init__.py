"""Which of a host's experts are in memory: states, budget, eviction."""
