"""Hugging Face models: families, shards of blocks, weight files.

No Ray, no job spec.
"""
