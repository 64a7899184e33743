"""From nothing to a released private model, by the commands that stand in README and runbook."""
