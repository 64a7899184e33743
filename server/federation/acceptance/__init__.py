"""Whether a round is kept: its weights against public images, and the way back."""
