"""The round loop: select, request, aggregate, step, record."""
