"""The dense oracle: F = kron(G, A) for row-major vec(W), an equality-constrained quadratic,
`torch.linalg.solve`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Linear
from ray_surgeon.maths.kronecker import Damping, PackedFactors, damp_
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import PackedSymmetric

DAMPING = Damping(0.01, 0.1, 1.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def spd(n: int, seed: int) -> Tensor:
    x = draw(3 * n, n, seed=seed)
    x = x * torch.logspace(0, -1, n, dtype=torch.float64) + 0.5 * x[:, :1]
    return x.T @ x / len(x)


def problem(R: int = 6, C: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return draw(R, C), spd(C, 1), spd(R, 2)


def packed(matrix: Tensor) -> PackedSymmetric:
    """Return a symmetric matrix as a packed sum."""
    result = PackedSymmetric.zeros(len(matrix), dtype=matrix.dtype)
    for start, panel in result.panels():
        panel.copy_(matrix[start : start + len(panel), start:])
    return result


def linear(W: Tensor, A: Tensor, G: Tensor, *, has_bias: bool = False) -> Linear:
    """Return a linear whose factors are means A and G over some tokens."""
    num_tokens = 11
    sums = packed(A * num_tokens), packed(G * num_tokens)
    factors = PackedFactors(*sums, num_tokens)
    return Linear("x", W, factors, has_bias, DAMPING)


def fisher(of: Linear, live: StructuredMask, damping: Damping = DAMPING) -> Tensor:
    """Return F of a part of a linear: kron(G, A), both damped."""
    factors = of.factors.dense()
    G = factors.G[live.rows][:, live.rows] / factors.num_tokens
    A = factors.A[live.columns][:, live.columns] / factors.num_tokens
    return torch.kron(damped(G, damping.g), damped(A, damping.a))


def dense_minimum(W: Tensor, F: Tensor, removed: Tensor) -> tuple[Tensor, float]:
    """Minimise 1/2 d^T F d subject to (W + D) = 0 on `removed`; return the new weights and the
    cost.
    """
    E = torch.eye(W.numel(), dtype=W.dtype)[removed.flatten()]
    constraints = torch.cat([E, E.new_zeros(len(E), len(E))], dim=1)
    system = torch.cat([torch.cat([F, E.T], dim=1), constraints])
    right = torch.cat([W.new_zeros(W.numel()), -E @ W.flatten()])
    d = torch.linalg.solve(system, right)[: W.numel()]
    return W + d.view_as(W), float(0.5 * d @ F @ d)


def cost_without_update(W: Tensor, F: Tensor, removed: Tensor) -> float:
    d = torch.where(removed, -W, 0).flatten()
    return float(0.5 * d @ F @ d)


def too_indefinite(A: Tensor) -> Tensor:
    """Return a matrix that is not positive definite with damping 0.01, and is with 0.1."""
    shifted = A - torch.linalg.eigvalsh(A)[0] * torch.eye(len(A), dtype=A.dtype)
    return shifted - 0.03 * shifted.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)


def silence(matrix: Tensor, *indices: int) -> None:
    """Make a factor that of inputs or gradients some of which are always zero."""
    matrix[list(indices)] = 0
    matrix[:, list(indices)] = 0


def crossing(R: int, C: int, rows: list[int], columns: list[int]) -> Tensor:
    return flags(R, rows)[:, None] | flags(C, columns)


def flags(n: int, indices: list[int]) -> Tensor:
    vector = torch.zeros(n, dtype=torch.bool)
    vector[indices] = True
    return vector


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return a damped copy."""
    return damp_(matrix.clone(), damping)
