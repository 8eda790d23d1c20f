"""How a text becomes a question to a model, and how its answer is scored."""
