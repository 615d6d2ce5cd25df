"""The dense oracle of `tests.maths.dense` with further Kronecker terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_surgeon.experimental.extended_kfac.curvature import ExtendedLinear
from ray_surgeon.experimental.extended_kfac.terms import Term, clip_term
from ray_surgeon.maths.curvature import Linear
from ray_surgeon.maths.masks import StructuredMask
from tests.maths import dense
from tests.maths.dense import DAMPING, draw


def indefinite(n: int, seed: int) -> Tensor:
    x = draw(n, n, seed=seed)
    return (x + x.T) / 2


def further_terms(A: Tensor, G: Tensor, number: int) -> list[Term]:
    """Return terms that are clipped so that their sum with kron(G, A) is positive definite."""
    roots = torch.linalg.cholesky(G), torch.linalg.cholesky(A)
    wild = [
        (indefinite(len(G), 11 + i), indefinite(len(A), 21 + i)) for i in range(number)
    ]
    return [clip_term(term, *roots, 1 / number)[0] for term in wild]


def linear(
    W: Tensor,
    A: Tensor,
    G: Tensor,
    further: Sequence[Term],
    *,
    has_bias: bool = False,
) -> ExtendedLinear:
    """Return a linear whose factors are means A and G over some tokens, with further terms."""
    first = dense.linear(W, A, G, has_bias=has_bias)
    return ExtendedLinear(
        name=first.name,
        W=first.W,
        factors=first.factors,
        has_bias=first.has_bias,
        damping=DAMPING,
        further=tuple(further),
    )


def fisher(of: Linear, live: StructuredMask) -> Tensor:
    """Return F of a part of a linear: the sum of its terms, the first of them damped."""
    assert isinstance(of, ExtendedLinear)
    total = dense.fisher(of, live)
    for G, A in of.further:
        total = total + torch.kron(
            G[live.rows][:, live.rows], A[live.columns][:, live.columns]
        )
    return total
