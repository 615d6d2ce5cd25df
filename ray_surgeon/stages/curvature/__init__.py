"""Curvature of the loss: A and G of every linear, from the calibration text."""
