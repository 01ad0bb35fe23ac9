"""Sampling, detokenization and the step loop."""
