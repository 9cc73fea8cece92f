"""The directory of a run: its config, results, checkpoints and lock."""
