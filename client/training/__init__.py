"""One local round of training."""
