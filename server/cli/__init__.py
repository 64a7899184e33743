"""The command `maskfed-server`."""
