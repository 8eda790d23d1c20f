"""The durable record of a run: which scalars were applied to which base weights, and how to apply them again."""
