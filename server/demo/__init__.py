"""The whole idea on one machine, for show."""
