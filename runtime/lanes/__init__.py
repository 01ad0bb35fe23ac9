"""Lanes: the ways to get one expert's output, what each costs here, and which to take."""
