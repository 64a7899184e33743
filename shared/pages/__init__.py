"""What all pages share: their look, and the live page's parts and script."""
