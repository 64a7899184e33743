"""Virtual sites of `maskfed-server simulate`; no process of a real site imports this."""
