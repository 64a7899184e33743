"""What a plan costs and brings, in seconds and before anybody is asked."""
