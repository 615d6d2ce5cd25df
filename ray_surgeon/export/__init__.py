"""Checkpoints for others: written by the workers, reloaded in a fresh process, compared."""
