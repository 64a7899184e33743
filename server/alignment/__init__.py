"""Public images made similar to the sites' own, by one private mean image of each site."""
