"""Messages to sites and back, with deadlines and retries."""
