"""Images: decoding, caches, order of visits, and synthetic faces."""
