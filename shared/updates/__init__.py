"""What an update may be and how it is rounded: the same arithmetic at the coordinator and at the sites. No torch."""
