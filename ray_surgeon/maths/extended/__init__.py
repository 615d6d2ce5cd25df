"""An extension of the paper that is worse than the defaults (docs/negative-results.md).

It approximates the Fisher by sums of Kronecker products.
"""
