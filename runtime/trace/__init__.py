"""Traces: which experts every layer call used, and what a cache of some size would have made of it."""
