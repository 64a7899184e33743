"""One module per claim of speed; `python -m benchmarks` runs them and writes BENCHMARKS.md. See README.md."""
