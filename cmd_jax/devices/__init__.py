"""Devices and processes: how arrays and work are spread over them."""
