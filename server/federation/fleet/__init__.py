"""The sites and the SuperLink that they are connected to."""
