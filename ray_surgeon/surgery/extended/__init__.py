"""The paper's extensions that lose to the defaults: sums of Kronecker products, and updates chunk by chunk (docs/negative-results.md)."""
