"""The method itself: schedule, masks, losses, networks, samplers, wavelet transform."""
