"""Checks of clock, connection and health."""
