"""The live page of a coordinator or a site: read only, on loopback."""
