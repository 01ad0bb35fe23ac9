"""The packed tensor layout and the shard format."""
