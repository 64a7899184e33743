"""What a site's live page shows its operator, from files alone; no torch."""
