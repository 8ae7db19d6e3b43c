"""Methods that need statistics of the experts on their inputs."""
