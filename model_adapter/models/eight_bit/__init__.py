"""Weights of 8 bits, by which a model reads on a CPU."""
