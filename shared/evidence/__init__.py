"""Evidence that can be checked elsewhere: signed bundles of files."""
