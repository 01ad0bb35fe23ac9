"""What an engine will hold in memory, decided before anything is loaded. No Ray."""
