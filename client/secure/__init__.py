"""Masked updates at the site: with whom, under which key, and what is given back afterwards. No torch."""
