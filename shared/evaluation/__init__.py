"""Generated images, feature networks, and distances between sets of images."""
