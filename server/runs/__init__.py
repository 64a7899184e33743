"""Run directories and the recipes they start from."""
