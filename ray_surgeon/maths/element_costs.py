"""Costs of single elements and of N:M groups.

Source: docs/method.md, section 3; The LLM Surgeon, section 3.2 and appendix A.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def element_costs(W: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """Cost of each element: 1/2 W_rc^2 times the product of the scales at (r, c).

    After the optimal update of all others (OBS) the product is 1 / [F^-1]_(r,c),(r,c) = 1 /
    ([G^-1]_rr [A^-1]_cc). Without any update (OBD) it is the diagonal of F, G_rr A_cc.

    Args:
        W: [R, C].
        row_scale: [R, 1], or [R, C] if the product is in it already.
        column_scale: [1, C] or [1, 1].

    Returns:
        [R, C] costs, in the loss's units.
    """
    return 0.5 * W.square() * (row_scale * column_scale)


def group_patterns(n: int, m: int) -> Tensor:
    """Return every choice of the ``m - n`` of `m` places to prune, [num_patterns, m - n]."""
    return torch.tensor(list(combinations(range(m), m - n)))


def group_costs(
    W: Tensor, inverse_blocks: Tensor, row_factor: Tensor, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """Exact joint cost of the best pattern of every N:M group: 1/2 w_P ([F^-1]_PP)^-1 w_P^T.

    Args:
        W: [R, C], C a multiple of `m`; groups are `m` consecutive inputs of one row, starting at
            column 0.
        inverse_blocks: [R or 1, C / m, m, m] and
        row_factor: [R]: their product is the block of F^-1 of each group.
        n: elements that stay in each group.
        m: elements of a group.

    Returns:
        [R, C / m] costs and [R, C / m] the index into `group_patterns` of the best pattern.
    """
    R, C = W.shape
    groups = W.view(R, C // m, m)
    best = torch.full((R, C // m), torch.inf, dtype=W.dtype, device=W.device)
    choice = torch.zeros(R, C // m, dtype=torch.int64, device=W.device)
    for number, pattern in enumerate(group_patterns(n, m).to(W.device)):
        inner = torch.linalg.inv(inverse_blocks[:, :, pattern][:, :, :, pattern]).expand(
            R, -1, -1, -1
        )
        w = groups[:, :, pattern]
        cost = 0.5 * torch.einsum("rgi,rgij,rgj->rg", w, inner, w) / row_factor[:, None]
        better = cost < best
        best = torch.where(better, cost, best)
        choice = torch.where(better, number, choice)
    return best, choice


def summed_group_costs(costs: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Cost of every N:M group: the sum of its ``m - n`` smallest single costs.

    This is the paper's choice.

    Args:
        costs: [R, C] single costs.
        n: elements that stay in each group.
        m: elements of a group.

    Returns:
        [R, C / m] costs and [R, C / m] the index into `group_patterns` of the pattern.
    """
    R, C = costs.shape
    groups = costs.view(R, C // m, m)
    patterns = group_patterns(n, m).to(costs.device)
    # by the places, each a bit
    number_of = torch.zeros(1 << m, dtype=torch.int64, device=costs.device)
    number_of[(1 << patterns).sum(dim=-1)] = torch.arange(len(patterns), device=costs.device)
    places = groups.sort(dim=-1, stable=True).indices[:, :, : m - n].sort(dim=-1).values
    return groups.gather(-1, places).sum(dim=-1), number_of[(1 << places).sum(dim=-1)]


def pattern_removals(chosen: Tensor, choice: Tensor, n: int, m: int) -> Tensor:
    """Return which elements to prune [R, C] bool.

    They are those of the pattern `choice` [R, C / m] in every group `chosen` [R, C / m] bool.
    """
    patterns = group_patterns(n, m).to(choice.device)
    places = torch.zeros(len(patterns), m, dtype=torch.bool, device=choice.device)
    places.scatter_(1, patterns, True)
    return (places[choice] & chosen[:, :, None]).reshape(choice.shape[0], -1)
