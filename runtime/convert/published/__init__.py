"""Checkpoints that are quantized already. Each format is a file; ``formats.find_published`` is what the rest calls."""
