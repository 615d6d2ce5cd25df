"""The pass over the calibration text that collects A and G."""
