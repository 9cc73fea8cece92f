"""Weights of other programs in, weights for other programs out."""
