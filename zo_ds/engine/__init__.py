"""The zeroth-order engine: losses -> agree -> journal -> apply."""
