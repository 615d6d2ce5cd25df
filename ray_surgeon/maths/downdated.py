"""Inverses from which rows and columns are eliminated, as greedy paths need them.

Source: docs/method.md, sections 3 and 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.factorised import DampedFactor, solve_lower, squares


class DowndatedInverse:
    """The inverse M of a damped factor from which rows and columns are eliminated.

    M -= M_:Q (M_QQ)^-1 M_Q:, without M itself.

    Costs need only diagonal blocks of M, and an elimination only the columns it eliminates: both
    follow from the Cholesky factor and from the V with M = L^-T L^-1 - V^T V that the eliminations
    so far have left.
    """

    def __init__(self, factor: DampedFactor, sets: Tensor) -> None:
        """Start with nothing eliminated.

        Args:
            factor: [n, n].
            sets: [num_sets, w] indices of the diagonal blocks that are wanted.
        """
        self._factor = factor
        n = len(factor.cholesky)
        self._sets = sets
        self.blocks = factor.inverse_blocks(sets)  # [num_sets, w, w]
        self._V = factor.cholesky.new_empty(0, n)
        self._k = 0
        self._is_gone = torch.zeros(n, dtype=torch.bool, device=factor.cholesky.device)

    def of_part(self, left: Tensor, sets: Tensor) -> DowndatedInverse:
        """Return the same for the indices that are left, [n] bool; `sets` count among them."""
        return DowndatedInverse(self._factor.part(left), sets)

    @property
    def diagonal(self) -> Tensor:
        """The entries [num_sets] of sets of one."""
        return self.blocks[:, 0, 0]

    def eliminate(self, Q: Tensor) -> Tensor:
        """Eliminate rows and columns [q], and return Y = (M_QQ)^-1 M_Q: [q, n].

        The block of a set that is gone becomes the identity.
        """
        V = self._V[: self._k]
        columns = self._factor.inverse_columns(Q).addmm_(V.T, V[:, Q], alpha=-1)
        K = root(columns[Q])
        X = solve_lower(K, columns.T)
        self._remember(X)
        self.blocks -= squares(X.T[self._sets])
        gone = self._is_gone.index_fill_(0, Q, True)[self._sets].all(dim=1)
        self.blocks[gone] = torch.eye(self._sets.shape[1], dtype=X.dtype, device=X.device)
        return solve_lower(K, X, transposed=True)

    def _remember(self, X: Tensor) -> None:
        k = self._k + len(X)
        if k > len(self._V):
            longer = X.new_empty(min(max(k, 2 * self._k), X.shape[1]), X.shape[1])
            longer[: self._k] = self._V[: self._k]
            self._V = longer
        self._V[self._k : k] = X
        self._k = k


def root(block: Tensor) -> Tensor:
    """Return a lower L with L L^T = block, which rounding may have made indefinite."""
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(block)
    if failed:
        values, vectors = torch.linalg.eigh(block.double())
        values = values.clamp(min=1e-7 * float(values[-1].clamp(min=1e-30)))
        L = torch.linalg.qr((vectors * values.sqrt()).T).R.T.to(block.dtype)
    return L
