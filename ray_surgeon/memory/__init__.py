"""Where a worker keeps weights and factors: on its device, in the memory of its host, or on its disk."""
