"""The update for any set of removed elements, by preconditioned conjugate gradients.

Source: docs/method.md, section 4. D is the change of the weights, with D = -W on removed elements.
The kept entries of D minimise ``1/2 tr(D^T G D A)``, so (G D A) is zero on them. A product with the
matrix of this system is two GEMMs and a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import FisherProducts, Removal

_REFRESH = 11
"""Iterations with narrow products after which the residual is recomputed in full precision."""


class ElementUpdate(NamedTuple):
    """How kept elements are updated to compensate for pruned ones.

    Attributes:
        solver: ``conjugate_gradients`` (all correlations at once), ``single`` (the correction of
            every pruned element as if it were the only one) or ``none``.
        num_iterations: largest number of iterations of conjugate gradients.
        tolerance: relative residual at which conjugate gradients stop.
        precision: dtype of the products in conjugate gradients, for example ``bfloat16``.
    """

    solver: str
    num_iterations: int = 0
    tolerance: float = 0.0
    precision: str = "float32"


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    return torch.dot(X.view(-1), Y.view(-1))


def update_elements(
    W: Tensor,
    products: FisherProducts,
    kept: Tensor,
    update: ElementUpdate,
) -> Removal:
    """Remove elements and update the kept ones of a linear, with all correlations.

    Products with F may be computed in a narrower dtype, which is several times faster (see
    `FisherProducts`); the direction update (Polak-Ribiere) tolerates their rounding. Weights,
    preconditioner and residual have the dtype of W. The reported residual is recomputed in that
    dtype.

    Args:
        W: [R, C]; entries that earlier shots removed are zero.
        products: products with F, which is positive definite.
        kept: [R, C] bool, False for every entry that is removed, now or by earlier shots.
        update: largest number of iterations, and tolerance.

    Returns:
        The new weights and the final residual.
    """
    mask = kept.to(W.dtype)
    change = W * (mask - 1)
    residual = _residual(change, products, mask)
    start = float(torch.linalg.norm(residual))
    if start == 0.0:
        predicted = 0.5 * float(_dot(change, products.exact(change)))
        return Removal(W=W * mask, predicted=predicted, residual=0.0)
    _conjugate_gradients(
        change=change,
        residual=residual,
        products=products,
        mask=mask,
        update=update,
    )
    product = products.exact(change)
    predicted = 0.5 * float(_dot(change, product))
    left = float(torch.linalg.norm(product.mul_(mask))) / start
    return Removal(W=(W + change) * mask, predicted=predicted, residual=left)


def _conjugate_gradients(
    change: Tensor,
    residual: Tensor,
    products: FisherProducts,
    mask: Tensor,
    update: ElementUpdate,
) -> None:
    """Improve the kept entries of a change [R, C] in place, given its residual."""
    start = float(torch.linalg.norm(residual))
    precondition = products.preconditioner(mask)
    z = precondition(residual)
    direction = z.clone()
    rz = _dot(residual, z)
    for iteration in range(1, update.num_iterations + 1):
        product = products.narrow(direction).mul_(mask)
        curved = _dot(direction, product)
        if not (rz > 0 and curved > 0):  # no further progress is possible in this dtype
            break
        step = _dot(residual, direction) / curved
        change.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        is_last = iteration == update.num_iterations
        if (
            products.narrow_dtype != change.dtype
            and iteration % _REFRESH == 0
            and not is_last
        ):
            # narrow products let the recurrence drift from the true residual
            residual = _residual(change, products, mask)
        z = precondition(residual)
        direction.mul_(-step * _dot(product, z) / rz).add_(z)
        rz = _dot(residual, z)
        if not float(torch.linalg.norm(residual)) / start > update.tolerance:
            break


def _residual(change: Tensor, products: FisherProducts, mask: Tensor) -> Tensor:
    """Return minus (F D) on kept elements, [R, C]."""
    return products.exact(change).mul_(mask).neg_()
