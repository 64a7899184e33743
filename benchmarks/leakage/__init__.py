"""Whether masked pre-training leaks less of the images it saw: the same attacks at three mask ratios."""
