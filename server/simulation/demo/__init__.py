"""`maskfed-server demo`: the whole idea on one machine, by the very commands that operators type."""
