"""What a site agrees to unless its operator says otherwise: the numbers that `maskfed-client join` writes down.

Both sides read them: a coordinator plans with what most sites will accept.
"""

EPSILON_CAP = 8.0
"""Largest epsilon of a data set, over all plans."""
DELTA = 1e-5
MIN_NOISE = 0.5
"""Smallest noise multiplier of a plan."""
MAX_STEPS = 2000
"""Optimizer steps of a round."""
MAX_ROUNDS = 100
"""Rounds in 24 hours."""
