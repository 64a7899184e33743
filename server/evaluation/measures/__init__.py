"""What is measured of a model: figures from features, and from images."""
