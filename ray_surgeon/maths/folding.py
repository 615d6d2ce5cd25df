"""Folding of a removed layer into the linear before it.

The removed layer added d to the residual stream. The linear before it, which adds W a to the
stream, is changed to add W a + X a, where X a is the best approximation of d. This is exact least
squares for any curvature of the loss at the stream: the X that minimises
E[(d - X a)^T G (d - X a)] is the same for every invertible G.

Source: docs/method.md, section 12. ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) instead uses
a map of the linear's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.kronecker import factorise


def folded(
    W: Tensor, A: Tensor, D: Tensor, damping: float, max_damping: float, name: str
) -> tuple[Tensor, float]:
    """Return the weights W + X of a linear that replaces a removed layer.

    Args:
        W: [R, C] weights of the linear, with its bias as the last column.
        A: [C, C] sum of a a^T over tokens, where a [C] is the input of the linear. Columns of W
            whose inputs are always zero, such as pruned columns, do not change.
        D: [R, C] sum of d a^T over the same tokens, where d [R] is what the layer added.
        damping: damping of A, relative to the mean of the diagonal.
        max_damping: largest damping that may be tried, see `factorise`.
        name: name of the linear, for errors.

    Returns:
        [R, C] new weights, and the sum over tokens of |d|^2 - |d - X a|^2.

    Raises:
        FloatingPointError: A cannot be factorised.
    """
    live = (A.diagonal() > 0).nonzero()[:, 0]
    A_live = A[live][:, live]
    D_live = D[:, live]
    factor = factorise(A_live.clone(), damping, max_damping, name)
    X = torch.cholesky_solve(D_live.T, factor.cholesky).T
    gain = 2 * (X * D_live).sum() - ((X @ A_live) * X).sum()
    new = W.clone()
    new[:, live] += X
    return new, float(gain)
