"""What the coordinator's live page shows, from files alone; no torch."""
