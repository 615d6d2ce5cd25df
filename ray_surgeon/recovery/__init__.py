"""Recovery of quality after pruning: reconstruction of layers, and training."""
