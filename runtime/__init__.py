"""Everything that runs inside one process. No Ray here."""
