"""A run as one HTML page: scores, curves, photographs and their look-alikes."""
