"""Which entries of task vectors are kept: thresholds, random drops, elected signs."""
