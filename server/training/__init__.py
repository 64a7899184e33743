"""Training on public images."""
