"""What the operator of a site sees: status, live view, doctor, metrics."""
