"""The held-out check: denoising losses on public images after a round, and whose update made them jump."""
