"""Thin Ray shells around moray.runtime, and the one file that wires them."""
