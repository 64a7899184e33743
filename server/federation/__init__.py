"""A federated run: start, status, resubmission, evaluations beside it."""
