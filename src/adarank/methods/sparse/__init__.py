"""Methods that drop entries of task vectors."""
