"""Extended KFAC: the Fisher as a sum of Kronecker products.

It is worse than the defaults (docs/negative-results.md). A job asks for it with
``curvature.kind: extended_kfac``.
"""
