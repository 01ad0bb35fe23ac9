"""Where things are: topology, placement, health and the data plane. Ray only in ray_session."""
