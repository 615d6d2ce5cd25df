"""What brings quality back after pruning: reconstruction of layers, and training."""
