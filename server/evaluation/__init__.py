"""Samples and distances of a checkpoint."""
