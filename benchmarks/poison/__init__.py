"""What one bad site of nine can do to the model, and what the defaults make of it."""
