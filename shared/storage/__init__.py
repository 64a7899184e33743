"""Files that survive a crash: checkpoints, run logs, digests."""
