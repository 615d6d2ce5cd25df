"""Costs: the loss increase that the quadratic model predicts for the removal of a structure.

Source: docs/method.md, section 3; The LLM Surgeon, section 3.2 and appendix A. F = kron(G, A)
throughout, so with factors that are means over tokens a cost is in nats per token.
"""

from __future__ import annotations

from torch import Tensor

from ray_surgeon.maths.products import product


def row_costs(W: Tensor, A: Tensor, G_inverse_diagonal: Tensor) -> Tensor:
    """Cost of each row after the optimal update of the others: 1/2 (W_r A W_r^T) / [G^-1]_rr.

    Args:
        W: [R, C].
        A: [C, C] damped.
        G_inverse_diagonal: [R] diagonal of G^-1.

    Returns:
        [R] costs, in the loss's units.
    """
    return 0.5 * (product(W, A) * W).sum(dim=1) / G_inverse_diagonal


def column_costs(W: Tensor, G: Tensor, A_inverse_diagonal: Tensor) -> Tensor:
    """Cost of each column after the optimal update of the others: 1/2 (W_c^T G W_c) / [A^-1]_cc.

    Args:
        W: [R, C].
        G: [R, R] damped.
        A_inverse_diagonal: [C] diagonal of A^-1.

    Returns:
        [C] costs, in the loss's units.
    """
    return 0.5 * (W * product(G, W)).sum(dim=0) / A_inverse_diagonal


def diagonal_row_costs(W: Tensor, A: Tensor, G_diagonal: Tensor) -> Tensor:
    """Cost of each row if the others stay as they are (OBD): 1/2 G_rr (W_r A W_r^T), [R]."""
    return 0.5 * (product(W, A) * W).sum(dim=1) * G_diagonal


def diagonal_column_costs(W: Tensor, G: Tensor, A_diagonal: Tensor) -> Tensor:
    """Cost of each column if the others stay as they are (OBD): 1/2 A_cc (W_c^T G W_c), [C]."""
    return 0.5 * (W * product(G, W)).sum(dim=0) * A_diagonal


def column_removal_cost(change: Tensor, A: Tensor, G: Tensor, removed: Tensor) -> float:
    """Predicted loss increase of the removal of columns with the optimal update.

    With it, D A is zero in the other columns.

    Args:
        change: [R, C] new weights minus old weights, D.
        A: [C, C].
        G: [R, R].
        removed: [C] bool.
    """
    return 0.5 * float(
        (product(G, change[:, removed]) * product(change, A[:, removed])).sum(dtype=change.dtype)
    )


def quadratic_cost(change: Tensor, A: Tensor, G: Tensor) -> float:
    """Predicted loss increase of any change D of the weights: 1/2 tr(D^T G D A).

    That is 1/2 vec(D)^T kron(G, A) vec(D).

    Args:
        change: [R, C] new weights minus old weights.
        A: [C, C].
        G: [R, R].
    """
    return 0.5 * float((product(G, change) * product(change, A)).sum(dtype=change.dtype))
