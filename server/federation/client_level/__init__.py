"""Client-level DP: the mechanism of the coordinator, and what it has spent."""
