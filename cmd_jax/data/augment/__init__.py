"""Augmentation on the devices."""
