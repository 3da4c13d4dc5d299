"""Graph and budget in, keep mask out: the pruning methods."""
