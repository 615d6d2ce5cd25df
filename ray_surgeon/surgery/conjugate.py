"""All correlations at once: the update for any set of removed elements, by preconditioned conjugate gradients.

Source: method.md section 4. With D the change of the weights, D = -W on removed elements, the kept entries of D minimise
``1/2 tr(D^T G D A)``, so (G D A) is zero on them. A product with the system's matrix is two GEMMs and a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """An update and how well it solves its equations.

    Attributes:
        W: [R, C] new weights, zero on removed elements.
        residual: norm of (G D A) on kept entries, relative to its norm for D = -W on removed and 0 on kept ones.
        num_iterations: made.
    """

    W: Tensor
    residual: float
    num_iterations: int


def update_elements(
    W: Tensor, A: Tensor, G: Tensor, A_inverse: Tensor, G_inverse: Tensor, kept: Tensor, *, num_iterations: int, tolerance: float
) -> Solution:
    """Remove elements and update the kept ones of a linear, all correlations together.

    The preconditioner applies the inverse of the unconstrained problem, G^-1 X A^-1, between two masks.

    Args:
        W: [R, C]; entries that earlier shots removed are zero.
        A: [C, C] damped.
        G: [R, R] damped.
        A_inverse: [C, C].
        G_inverse: [R, R].
        kept: [R, C] bool, False for everything that is or goes to zero.
        num_iterations: at most so many.
        tolerance: stop at this relative residual.

    Returns:
        The new weights and the residual that is left.
    """
    mask = kept.to(W.dtype)
    change = W * (mask - 1)
    residual = -mask * (G @ change @ A)
    start = float(torch.linalg.norm(residual))
    if start == 0.0:
        return Solution(W * mask, 0.0, 0)
    z = mask * (G_inverse @ residual @ A_inverse)
    direction, rz = z.clone(), torch.sum(residual * z)
    left, iteration = 1.0, 0
    while iteration < num_iterations and left > tolerance:
        product = mask * (G @ direction @ A)
        step = rz / torch.sum(direction * product)
        change += step * direction
        residual -= step * product
        z = mask * (G_inverse @ residual @ A_inverse)
        previous, rz = rz, torch.sum(residual * z)
        direction = z + (rz / previous) * direction
        iteration += 1
        left = float(torch.linalg.norm(residual)) / start
    return Solution((W + change) * mask, left, iteration)
