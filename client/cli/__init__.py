"""The command `maskfed-client`."""
