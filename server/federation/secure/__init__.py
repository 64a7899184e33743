"""Masked updates at the coordinator: the roster of a run, the masked sum of a round, and what removes its masks."""
