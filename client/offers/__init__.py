"""Offers: what the site would do with a plan, and what it would cost, before anything is charged."""
