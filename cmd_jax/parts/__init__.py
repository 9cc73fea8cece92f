"""PARTICLE's first stage: parts of images, found in frozen features."""
