"""Attacks of a coordinator that cheats, through the real handlers of a site."""
