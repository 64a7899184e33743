"""Statistics of the site's images: features, and the mean image."""
