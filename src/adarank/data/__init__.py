"""Tasks: what they are, their rows, splits and batches."""
