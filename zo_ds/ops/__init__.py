"""Compiled twins of the maths layer's hot functions: CPU (SIMD) and CUDA from one header, registered with torch."""
