"""The command line's commands: what is typed. What they do is elsewhere, imported when they run."""
