"""Methods of pruning: what they score, choose, remove and update."""
