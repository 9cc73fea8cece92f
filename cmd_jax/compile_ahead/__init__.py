"""The train step compiled for devices that are not here, and what it costs."""
