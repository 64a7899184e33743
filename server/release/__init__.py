"""Audits at the sites and the gate in front of a release."""
