"""Replicas: who computes which unit of work, and the channel on which nothing but scalars crosses."""
