"""Text to tokens to batches: the dataset on disk and the ways in and out of it."""
