"""The typed configuration tree, how it is read, and what DeepSpeed gets to see of it."""
