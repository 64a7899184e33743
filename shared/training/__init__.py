"""The training step and what it stands on: optimizer, moving average, precision, processes."""
