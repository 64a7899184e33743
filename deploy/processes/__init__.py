"""The programs that run, and their supervision."""
