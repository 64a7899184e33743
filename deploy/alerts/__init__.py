"""Alerts to one webhook: what the operator should hear of without looking."""
