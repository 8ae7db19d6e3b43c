"""Methods on the singular value decomposition of task vectors."""
