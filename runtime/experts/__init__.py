"""Where expert shards come from, and the experts function that uses them."""
