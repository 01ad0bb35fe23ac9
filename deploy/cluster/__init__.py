"""``moray cluster``: keys, and this machine's node of a Ray cluster."""
