"""Base and experts, paired tensor by tensor by name, and the task vectors between them."""
