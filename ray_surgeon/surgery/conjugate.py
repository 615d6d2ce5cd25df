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
    W: Tensor,
    A: Tensor,
    G: Tensor,
    A_inverse: Tensor,
    G_inverse: Tensor,
    kept: Tensor,
    *,
    num_iterations: int,
    tolerance: float,
    product_dtype: torch.dtype | None = None,
) -> Solution:
    """Remove elements and update the kept ones of a linear, all correlations together.

    The preconditioner applies the inverse of the unconstrained problem, G^-1 X A^-1, between two masks. Products may be taken in a
    narrower dtype, which is several times faster: far from convergence their rounding matters little, and the direction update
    (Polak-Ribiere) bears it. Weights and residual are kept in the dtype of W, and the residual told is computed anew in it.

    Args:
        W: [R, C]; entries that earlier shots removed are zero.
        A: [C, C] damped.
        G: [R, R] damped.
        A_inverse: [C, C].
        G_inverse: [R, R].
        kept: [R, C] bool, False for everything that is or goes to zero.
        num_iterations: at most so many.
        tolerance: stop at this relative residual.
        product_dtype: of the GEMMs; that of W if None.

    Returns:
        The new weights and the residual that is left.
    """
    mask = kept.to(W.dtype)
    narrow = product_dtype or W.dtype
    narrow_A, narrow_G, narrow_A_inverse, narrow_G_inverse = (x.to(narrow) for x in (A, G, A_inverse, G_inverse))
    change = W * (mask - 1)
    residual = -mask * (G @ change @ A)
    start = float(torch.linalg.norm(residual))
    if start == 0.0:
        return Solution(W * mask, 0.0, 0)
    z = mask * (narrow_G_inverse @ residual.to(narrow) @ narrow_A_inverse)
    direction, rz = z, torch.sum(residual * z)
    left, iteration = 1.0, 0
    while iteration < num_iterations and left > tolerance:
        product = mask * (narrow_G @ direction.to(narrow) @ narrow_A)
        step = torch.sum(residual * direction) / torch.sum(direction * product)
        change += step * direction
        residual -= step * product
        z = mask * (narrow_G_inverse @ residual.to(narrow) @ narrow_A_inverse)
        direction = z - (step * torch.sum(product * z) / rz) * direction
        rz = torch.sum(residual * z)
        iteration += 1
        left = float(torch.linalg.norm(residual)) / start
    left = float(torch.linalg.norm(mask * (G @ change @ A))) / start
    return Solution((W + change) * mask, left, iteration)
