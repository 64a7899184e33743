"""The site's images: scan, held-out share, units of privacy."""
