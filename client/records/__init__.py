"""What the site writes down: ledger, journal, stored replies."""
