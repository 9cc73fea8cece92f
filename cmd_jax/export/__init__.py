"""What is taken away from a run."""
