"""The device's tier: shards kept in its memory, and experts computed on it."""
