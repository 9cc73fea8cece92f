"""Configs: what they may be, and what they are if nothing is said."""
