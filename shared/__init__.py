"""The diffusion core and formats that server and client have in common."""
