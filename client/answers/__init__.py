"""Answers to questions other than training: feature statistics and audits."""
