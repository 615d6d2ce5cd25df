"""Reconstruction of feed-forward layers that lost channels."""
