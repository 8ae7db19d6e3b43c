"""Methods that keep weights of each task, written as bundles."""
