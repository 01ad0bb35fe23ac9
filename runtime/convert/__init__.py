"""Checkpoint directory to store."""
