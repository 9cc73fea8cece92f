"""From a source to batches on the devices."""
