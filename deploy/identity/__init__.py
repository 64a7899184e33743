"""Certificates, keys, enrolment lines and join bundles."""
