"""Ways to prune.

A file holds those of one kind of parts: their sections of the job spec, what they do on a worker
and what they do on the coordinator.

Coupled groups, the longest, have further files: their section, costs as workers send them with how
far these are followed, what the coordinator chooses, what goes whole, and the
reconstruction of layers. Corrections and further Kronecker terms, which go with several ways, have
files of their own.
"""
