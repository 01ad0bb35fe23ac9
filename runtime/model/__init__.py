"""The transformers model around our experts and packed weights."""
