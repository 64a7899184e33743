"""Which sites may take part: the commands, and the door kept in step with the registry."""
