"""Data sets by name, and the rows they are read as."""
