"""Depth: whole blocks and layers that are removed."""
