"""Studies of the paper's claims: definitions, stored results, toys."""
