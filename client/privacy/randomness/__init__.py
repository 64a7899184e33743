"""Random numbers of private rounds."""
