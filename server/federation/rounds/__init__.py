"""The round loop: wait, select, request, count, fold, keep."""
