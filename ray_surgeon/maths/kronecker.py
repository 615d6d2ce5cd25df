"""Kronecker factors of one linear's Fisher: sums over tokens, merged and balanced.

Source: docs/method.md, section 1 (KFAC, Martens & Grosse 2015; The LLM Surgeon, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.masks import places
from ray_surgeon.maths.products import PackedSymmetric, product


@dataclass(frozen=True)
class KroneckerFactors:
    """A and G of one linear as sums over tokens.

    Sums of micro-batches, of replicas and of resumed work can be added up.

    Attributes:
        A: [C, C] sum of a a^T.
        G: [R, R] sum of g g^T.
        num_tokens: tokens in both sums.
    """

    A: Tensor
    G: Tensor
    num_tokens: int


@dataclass(frozen=True)
class PackedFactors:
    """The factors of one linear as they are gathered: half of each symmetric matrix.

    They may be in the memory of the host or on disk.
    """

    A: PackedSymmetric  # [C, C]
    G: PackedSymmetric  # [R, R]
    num_tokens: int  # in both sums

    def dense(self, device: torch.device | None = None) -> KroneckerFactors:
        """Return the factors as whole matrices, which are copies."""
        return KroneckerFactors(
            A=self.A.dense(device),
            G=self.G.dense(device),
            num_tokens=self.num_tokens,
        )

    def restricted(self, rows: Tensor, columns: Tensor) -> KroneckerFactors:
        """Return the factors of the alive rows [R] and columns [C] (bool masks).

        A and G are copies on the device of the masks.
        """
        alive_rows, alive_columns = places(rows, columns)
        return KroneckerFactors(
            A=_part(self.A.dense(columns.device), alive_columns),
            G=_part(self.G.dense(rows.device), alive_rows),
            num_tokens=self.num_tokens,
        )


def _part(matrix: Tensor, alive: Tensor | None) -> Tensor:
    if alive is None:
        return matrix
    return matrix[alive][:, alive]


def balance_(A: Tensor, G: Tensor) -> None:
    """Scale A and G in place to equal Frobenius norms; kron(G, A) does not change.

    If one of them is zero, neither is scaled.

    Args:
        A: [..., C, C].
        G: [..., R, R].
    """
    norm_A = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
    norm_G = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    ratio = torch.sqrt(norm_G / norm_A)
    ratio.masked_fill_((norm_A == 0) | (norm_G == 0), 1.0)
    A.mul_(ratio)
    G.div_(ratio)


@dataclass(frozen=True)
class Damping:
    """Damping of the factors, relative to their mean diagonals (docs/method.md, section 2)."""

    a: float  # of A
    g: float  # of G
    max: float  # the largest damping that may be tried when a factor is not positive definite


# Costs: the loss increase predicted by the quadratic model with F = kron(G, A), in nats per token
# if the factors are means over tokens. Source: docs/method.md, section 3


def row_costs(W: Tensor, A: Tensor) -> Tensor:
    """Return 1/2 W_r A W_r^T of each row [R], in the loss's units.

    The cost of a row is this divided by [G^-1]_rr if the other rows get the optimal update, and
    this times G_rr if they do not change (OBD).
    """
    return 0.5 * (product(W, A) * W).sum(dim=1)


def column_costs(W: Tensor, G: Tensor) -> Tensor:
    """Return 1/2 W_c^T G W_c of each column [C].

    The cost of a column is this divided by [A^-1]_cc, or times A_cc, as for `row_costs`.
    """
    return 0.5 * (W * product(G, W)).sum(dim=0)


def column_removal_cost(change: Tensor, A: Tensor, G: Tensor, removed: Tensor) -> Tensor:
    """Return the predicted loss increase of removing columns with the optimal update, a scalar.

    After that update D A is zero in all other columns.

    Args:
        change: [R, C] new weights minus old weights, D.
        A: [C, C].
        G: [R, R].
        removed: [C] bool.
    """
    columns = removed.nonzero()[:, 0]
    return 0.5 * (product(G, change[:, columns]) * product(change, A[:, columns])).sum()


def quadratic_cost(change: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """Return the predicted loss increase of any change D of the weights, a scalar.

    It is 1/2 tr(D^T G D A) = 1/2 vec(D)^T kron(G, A) vec(D).

    Args:
        change: [R, C] new weights minus old weights.
        A: [C, C].
        G: [R, R].
    """
    return 0.5 * (product(G, change) * product(change, A)).sum()
