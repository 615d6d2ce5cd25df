"""Rows and columns: the cost of a removal, and the correlated update of the weights that stay.

A cost is the loss increase that the quadratic model predicts. F = kron(G, A) throughout, so with
factors that are means over tokens it is in nats per token.

Source: docs/method.md, sections 3 and 4; The LLM Surgeon, section 3.2 to 3.4. `prune_rows` and
`prune_columns` solve the equality-constrained quadratic ``min 1/2 vec(D)^T kron(G, A) vec(D)``
subject to the pruned entries of W + D being zero. `prune_rows_and_columns` and `prune_singly` add
corrections that are each exact on their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.factorised import factorise, solve_lower
from ray_surgeon.maths.products import product


def _correlation(matrix: Tensor, to_prune: Tensor, name: str) -> Tensor:
    """Return M = matrix_KK^-1 matrix_KP, [kept, pruned].

    A part of a damped matrix is positive definite as it is.
    """
    kept = (~to_prune).nonzero()
    pruned = to_prune.nonzero()[:, 0]
    part = f"{name} (kept part, damped already)"
    L = factorise(matrix[kept, kept[:, 0]], 0.0, 0.0, part).cholesky
    return solve_lower(L, solve_lower(L, matrix[kept, pruned]), transposed=True)


def prune_rows(W: Tensor, G: Tensor, to_prune: Tensor, *, name: str = "G") -> Tensor:
    """Set the pruned rows to zero and add G_KK^-1 G_KP W_P to the kept ones (A cancels).

    Args:
        W: [R, C].
        G: [R, R] damped.
        to_prune: [R] bool.
        name: what G belongs to, for errors.

    Returns:
        [R, C] the new weights.
    """
    new = torch.zeros_like(W)
    if not to_prune.any():
        return W.clone()
    if not to_prune.all():
        new[~to_prune] = W[~to_prune] + product(_correlation(G, to_prune, name), W[to_prune])
    return new


def prune_columns(W: Tensor, A: Tensor, to_prune: Tensor, *, name: str = "A") -> Tensor:
    """Set the pruned columns to zero and add W_Q A_QL A_LL^-1 to the kept ones (G cancels).

    Args:
        W: [R, C].
        A: [C, C] damped.
        to_prune: [C] bool.
        name: what A belongs to, for errors.

    Returns:
        [R, C] the new weights.
    """
    return prune_rows(W.T, A, to_prune, name=name).T.contiguous()


def prune_rows_and_columns(
    W: Tensor, A: Tensor, G: Tensor, rows: Tensor, columns: Tensor, name: str
) -> Tensor:
    """Remove rows and columns together, as the published implementation does.

    Both corrections are taken from the original weights and added. The exact minimiser also has the
    term M W_PQ N; with the default damping the two tie in perplexity (docs/negative-results.md).

    Args:
        W: [R, C].
        A: [C, C] damped.
        G: [R, R] damped.
        rows: [R] bool, True = to prune.
        columns: [C] bool, likewise.
        name: the linear, for errors.

    Returns:
        [R, C] new weights, zero in every pruned row and column.
    """
    by_rows = prune_rows(W, G, rows, name=f"{name} G")
    by_columns = prune_columns(W, A, columns, name=f"{name} A")
    new = by_rows + by_columns - W
    new[rows] = 0
    new[:, columns] = 0
    return new


def prune_singly(
    W: Tensor, A_inverse: Tensor, G_inverse: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Remove rows and columns, and correct each as if it were pruned alone.

    OBS without correlations.

    Row p adds -[G^-1]_:p / [G^-1]_pp W_p, column q adds -W_q [A^-1]_q: / [A^-1]_qq, all from the
    original weights.

    Args:
        W: [R, C].
        A_inverse: [C, C].
        G_inverse: [R, R].
        rows: [R] bool, True = to prune.
        columns: [C] bool, likewise.

    Returns:
        [R, C] new weights, zero in every pruned row and column.
    """
    by_rows = G_inverse[:, rows] / G_inverse.diagonal()[rows] @ W[rows]
    by_columns = W[:, columns] / A_inverse.diagonal()[columns] @ A_inverse[columns]
    new = W - by_rows - by_columns
    new[rows] = 0
    new[:, columns] = 0
    return new


def row_costs(W: Tensor, A: Tensor) -> Tensor:
    """Return 1/2 W_r A W_r^T of each row [R], in the loss's units.

    The cost of a row after the optimal update of the others is this over [G^-1]_rr; if they stay as
    they are (OBD), it is this times G_rr.
    """
    return 0.5 * (product(W, A) * W).sum(dim=1)


def column_costs(W: Tensor, G: Tensor) -> Tensor:
    """Return 1/2 W_c^T G W_c of each column [C]; the cost is this over [A^-1]_cc, or times A_cc."""
    return 0.5 * (W * product(G, W)).sum(dim=0)


def column_removal_cost(change: Tensor, A: Tensor, G: Tensor, removed: Tensor) -> float:
    """Predicted loss increase of the removal of columns with the optimal update.

    With it, D A is zero in the other columns.

    Args:
        change: [R, C] new weights minus old weights, D.
        A: [C, C].
        G: [R, R].
        removed: [C] bool.
    """
    costs = product(G, change[:, removed]) * product(change, A[:, removed])
    return 0.5 * float(costs.sum(dtype=change.dtype))


def quadratic_cost(change: Tensor, A: Tensor, G: Tensor) -> float:
    """Predicted loss increase of any change D of the weights: 1/2 tr(D^T G D A).

    That is 1/2 vec(D)^T kron(G, A) vec(D).

    Args:
        change: [R, C] new weights minus old weights.
        A: [C, C].
        G: [R, R].
    """
    return 0.5 * float((product(G, change) * product(change, A)).sum(dtype=change.dtype))
