"""The paper's extension that loses to the defaults (docs/negative-results.md).

It is sums of Kronecker products.
"""
