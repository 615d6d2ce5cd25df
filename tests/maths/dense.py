"""The dense oracle: F = kron(G, A) for row-major vec(W), an equality-constrained quadratic,
`torch.linalg.solve`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.conjugate import ElementUpdate, update_elements
from ray_surgeon.maths.factorised import damp_
from ray_surgeon.maths.kronecker import Damping, KroneckerFactors, Term
from ray_surgeon.maths.linear import Linear, Removal

DAMPING = Damping(0.01, 0.1, 1.0)


def spd(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -1, n, dtype=torch.float64) + 0.5 * x[:, :1]
    return x.T @ x / len(x)


def problem(R: int = 6, C: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(R, C, generator=generator, dtype=torch.float64),
        spd(C, seed + 1),
        spd(R, seed + 2),
    )


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def linear(
    W: Tensor, A: Tensor, G: Tensor, *, has_bias: bool = False, num_tokens: int = 11
) -> Linear:
    """Return a linear whose factors are means A and G over some tokens."""
    return Linear(
        "x",
        W,
        KroneckerFactors(A * num_tokens, G * num_tokens, num_tokens).packed(),
        has_bias,
        DAMPING,
    )


def by_conjugate_gradients(
    W: Tensor,
    terms: list[Term],
    kept: Tensor,
    *,
    num_iterations: int,
    tolerance: float,
    product_dtype: torch.dtype | None = None,
) -> Removal:
    """Update elements, with products in the dtype of W if no other is given."""
    precision = str(product_dtype or W.dtype).removeprefix("torch.")
    update = ElementUpdate("conjugate_gradients", num_iterations, tolerance, precision)
    return update_elements(W, terms, kept, update)


def dense_removal(W: Tensor, A: Tensor, G: Tensor, removed: Tensor) -> tuple[Tensor, float]:
    """Remove `removed` [R, C] bool under F = kron(G, A); see `dense_minimum`."""
    return dense_minimum(W, torch.kron(G, A), removed)


def dense_minimum(W: Tensor, F: Tensor, removed: Tensor) -> tuple[Tensor, float]:
    """Minimise 1/2 d^T F d subject to (W + D) = 0 on `removed`; return the new weights and the
    cost.
    """
    constrained = removed.reshape(-1).nonzero()[:, 0]
    n = F.shape[0]
    m = len(constrained)
    E = torch.zeros(m, n, dtype=W.dtype)
    E[torch.arange(m), constrained] = 1
    system = torch.cat(
        [torch.cat([F, E.T], dim=1), torch.cat([E, torch.zeros(m, m, dtype=W.dtype)], dim=1)]
    )
    right = torch.cat([torch.zeros(n, dtype=W.dtype), -W.reshape(-1)[constrained]])
    d = torch.linalg.solve(system, right)[:n]
    return W + d.view_as(W), float(0.5 * d @ F @ d)


def indefinite(n: int, seed: int) -> Tensor:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + x.T) / 2


def too_indefinite(A: Tensor) -> Tensor:
    """Return a matrix that is not positive definite with damping 0.01, and is with 0.1."""
    shifted = A - torch.linalg.eigvalsh(A)[0] * torch.eye(len(A), dtype=A.dtype)
    return shifted - 0.03 * shifted.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)


def crossing(R: int, C: int, rows: list[int], columns: list[int]) -> Tensor:
    removed = torch.zeros(R, C, dtype=torch.bool)
    removed[rows] = True
    removed[:, columns] = True
    return removed


def flags(n: int, indices: list[int]) -> Tensor:
    vector = torch.zeros(n, dtype=torch.bool)
    vector[indices] = True
    return vector


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return a damped copy."""
    return damp_(matrix.clone(), damping)
