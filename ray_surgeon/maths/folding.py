"""What a removed layer added to the residual stream, as a linear map of what an earlier one reads.

The linear before it, which adds W a to the stream, learns to add W a + X a, where X a is nearest to
what the layer added: d. That is exact least squares, whatever the curvature of the loss at the
stream is: min over X of E[(d - X a)^T G (d - X a)] is the same for every invertible G.

Source: docs/method.md, section 12; a map of the linear's outputs alone is ReplaceMe's (Shopkhoev et
al. 2025, arXiv 2505.02819).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.factorised import factorise


def folded(
    W: Tensor, A: Tensor, D: Tensor, damping: float, max_damping: float, name: str
) -> tuple[Tensor, float]:
    """Return W + X of the linear that takes over what a removed layer added to the stream.

    Args:
        W: [R, C] of the linear, its bias as the last column.
        A: [C, C] sum of a a^T over tokens, a being what the linear reads. Inputs that are always
            zero, as those of pruned columns, are left as they are.
        D: [R, C] sum of d a^T over the same tokens, d [R] being what the layer added.
        damping: of A, relative to the mean of the diagonal.
        max_damping: that may be tried, see `factorise`.
        name: the linear, for errors.

    Returns:
        [R, C], and the sum over tokens of |d|^2 - |d - X a|^2.

    Raises:
        FloatingPointError: A cannot be factorised.
    """
    live = (A.diagonal() > 0).nonzero()[:, 0]
    own = A[live][:, live]
    inverse = factorise(own.clone(), damping, max_damping, name).cholesky
    X = torch.cholesky_solve(D[:, live].T, inverse).T
    gain = 2 * (X * D[:, live]).sum() - ((X @ own) * X).sum()
    new = W.clone()
    new[:, live] += X
    return new, float(gain)
