"""Methods of pruning: their costs, choices, removals and updates."""
