"""A training run: one optimizer step at a time, checkpoints, metrics."""
