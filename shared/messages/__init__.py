"""What coordinator and sites send each other: typed headers and packed arrays."""
