"""RESULTS.md and its plots, from stored results."""
