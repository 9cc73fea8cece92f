"""Data sets of this project as TFDS builders, one package each."""
