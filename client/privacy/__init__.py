"""Differential privacy: DP-SGD, clipping, accounting, canaries."""
