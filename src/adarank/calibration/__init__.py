"""Statistics of activations and gradients, gathered from the experts on their inputs."""
