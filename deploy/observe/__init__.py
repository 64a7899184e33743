"""Logs and Prometheus pages."""
