"""Where weights and factors are kept: on the device, on its host, or on disk."""
