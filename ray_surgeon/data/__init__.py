"""Texts: where they come from, their windows, and those that the model writes."""
