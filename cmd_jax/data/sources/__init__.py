"""Where images come from: folders, shards, TFDS."""
