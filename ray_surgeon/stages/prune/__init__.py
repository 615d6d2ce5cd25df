"""Ways to prune.

A file holds one: its section of the job spec, what it does on a worker and what it does on the
coordinator.

Coupled groups, the longest, have further files: their section, costs as workers send them, how far
paths are followed, whole experts, the search, and the reconstruction of layers. Corrections and
further Kronecker terms, which go with several ways, have files of their own.
"""
