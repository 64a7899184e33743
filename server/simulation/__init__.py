"""Many sites on one machine: `simulate` and the demo."""
