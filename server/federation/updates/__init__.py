"""What becomes of the sites' updates: the exact sum, the server's step, the global model."""
