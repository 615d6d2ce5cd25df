"""The mathematics of The LLM Surgeon: pure functions on tensors, torch only.

Legend, used in every file of this package:

    R, C   outputs and inputs of one linear; a bias counts as one more input whose value is 1
    W      [R, C] weight, rows = outputs; vec(W) is row-major
    A      [C, C] second moment of the inputs
    G      [R, R] second moment of the gradients with respect to the outputs
    F      [R C, R C] Fisher of the linear, F = kron(G, A)
    mask   bool, True = kept
"""
