"""Experiment files: every setting of one training stage, checked."""
