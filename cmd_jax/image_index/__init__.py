"""Embeddings of images on disk, to be searched again and again."""
