"""Provisioning and supervision; imports neither server, client nor shared."""
