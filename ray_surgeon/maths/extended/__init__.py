"""The paper's extensions that lose to the defaults (docs/negative-results.md).

These are sums of Kronecker products, and updates chunk by chunk.
"""
