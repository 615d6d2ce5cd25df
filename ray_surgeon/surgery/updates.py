"""Correlated weight updates: how the kept weights change when rows and columns are pruned.

Source: docs/method.md, section 4; The LLM Surgeon, sections 3.3 and 3.4. Each solves the equality-constrained quadratic
``min 1/2 vec(D)^T kron(G, A) vec(D)`` subject to the pruned entries of W + D being zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.surgery.kronecker import factorise


def _correlation(matrix: Tensor, pruned: Tensor, name: str) -> Tensor:
    """Return M = matrix_KK^-1 matrix_KP, [kept, pruned].

    `matrix` is damped already; a part of a positive definite matrix is one too, so it needs no more damping.
    """
    kept = ~pruned
    factor = factorise(matrix[kept][:, kept], 0.0, 0.0, name)
    return torch.cholesky_solve(matrix[kept][:, pruned], factor.cholesky)


def prune_rows(W: Tensor, G: Tensor, pruned: Tensor, *, name: str = "G") -> Tensor:
    """Set the pruned rows to zero and add G_KK^-1 G_KP W_P to the kept ones (A cancels).

    Args:
        W: [R, C].
        G: [R, R] damped.
        pruned: [R] bool, True = to prune.
        name: what G belongs to, for errors.

    Returns:
        [R, C] the new weights.
    """
    new = torch.zeros_like(W)
    if not pruned.any():
        return W.clone()
    if not pruned.all():
        new[~pruned] = W[~pruned] + _correlation(G, pruned, name) @ W[pruned]
    return new


def prune_columns(W: Tensor, A: Tensor, pruned: Tensor, *, name: str = "A") -> Tensor:
    """Set the pruned columns to zero and add W_Q A_QL A_LL^-1 to the kept ones (G cancels).

    Args:
        W: [R, C].
        A: [C, C] damped.
        pruned: [C] bool, True = to prune.
        name: what A belongs to, for errors.

    Returns:
        [R, C] the new weights.
    """
    return prune_rows(W.T, A, pruned, name=name).T.contiguous()


def prune_rows_and_columns(
    W: Tensor,
    A: Tensor,
    G: Tensor,
    pruned_rows: Tensor,
    pruned_columns: Tensor,
    *,
    name: str = "",
) -> Tensor:
    """Remove rows and columns together, as the published implementation does.

    Both corrections are taken from the original weights and added. The exact minimiser also has the term M W_PQ N; with the default
    damping the two tie in perplexity (docs/negative-results.md).

    Args:
        W: [R, C].
        A: [C, C] damped.
        G: [R, R] damped.
        pruned_rows: [R] bool.
        pruned_columns: [C] bool.
        name: the linear, for errors.

    Returns:
        [R, C] new weights, zero in every pruned row and column.
    """
    by_rows = prune_rows(W, G, pruned_rows, name=f"{name} G")
    by_columns = prune_columns(W, A, pruned_columns, name=f"{name} A")
    new = by_rows + by_columns - W
    new[pruned_rows] = 0
    new[:, pruned_columns] = 0
    return new


def prune_singly(W: Tensor, A_inverse: Tensor, G_inverse: Tensor, pruned_rows: Tensor, pruned_columns: Tensor) -> Tensor:
    """Remove rows and columns and add the correction of each as if it were pruned alone (OBS without correlations).

    Row p adds -[G^-1]_:p / [G^-1]_pp W_p, column q adds -W_q [A^-1]_q: / [A^-1]_qq, all from the original weights.

    Args:
        W: [R, C].
        A_inverse: [C, C].
        G_inverse: [R, R].
        pruned_rows: [R] bool.
        pruned_columns: [C] bool.

    Returns:
        [R, C] new weights, zero in every pruned row and column.
    """
    by_rows = G_inverse[:, pruned_rows] / G_inverse.diagonal()[pruned_rows] @ W[pruned_rows]
    by_columns = W[:, pruned_columns] / A_inverse.diagonal()[pruned_columns] @ A_inverse[pruned_columns]
    new = W - by_rows - by_columns
    new[pruned_rows] = 0
    new[:, pruned_columns] = 0
    return new
