"""The two questions of secure sums: for a key at the start of a run, and for what removes the masks of a round."""
