"""Losses of a model under perturbed weights."""
