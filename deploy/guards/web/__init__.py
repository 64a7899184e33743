"""How Flower's processes call each other, and what stands before their web applications."""
