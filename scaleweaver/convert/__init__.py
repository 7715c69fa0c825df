"""Foreign checkpoints to ours, by declarative maps."""
