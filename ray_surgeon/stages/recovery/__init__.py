"""Training after pruning, from low-rank corrections to all weights."""
