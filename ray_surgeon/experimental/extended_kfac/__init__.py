"""Extended KFAC: the Fisher as a sum of Kronecker products.

Its results are worse than those of the defaults (docs/negative-results.md). A job selects it by
``curvature.kind: extended_kfac``.
"""
