"""Sums of masked updates after Bonawitz et al. (CCS 2017, arXiv 1611.04482). No torch, no flwr."""
