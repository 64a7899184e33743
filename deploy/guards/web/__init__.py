"""What stands before Flower's web applications: who calls, how much, and the short way to Flower's own handlers."""
