"""Checkpoints of other programs: reading files, names and shapes, import and export."""
