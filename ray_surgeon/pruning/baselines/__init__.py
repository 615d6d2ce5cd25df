"""Published methods for comparison.

`layerwise` has SparseGPT and Wanda, `layers` SLEB, ShortGPT, random and last layers, `experts`
REAP, frequency and random experts. Magnitude is `curvature.kind: identity` of any structure.
"""
