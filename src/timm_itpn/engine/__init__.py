"""What every kind of training stands on: options, samples and batches, updates, checkpoints, log, and their loop."""
