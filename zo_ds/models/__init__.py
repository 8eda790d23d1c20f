"""Models by name, and the files they are read from."""
