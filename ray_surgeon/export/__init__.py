"""Checkpoints for other programs, written by the workers and checked in fresh processes."""
