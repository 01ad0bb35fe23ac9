"""``moray bench``: kernels against this machine's memory, and decoding through an engine."""
