"""Of this project: torch-fidelity installs a package of the same name."""
