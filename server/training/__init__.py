"""Training on public images, and checkpoints of other programs."""
