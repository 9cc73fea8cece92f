"""FGVC-Aircraft: photographs of 100 variants of aircraft."""
