"""Linears rounded to few bits, in an order in which what comes later answers every error so far.

With E = rounded W - W [R, C], the predicted loss increase is 1/2 tr(G E A E^T). Without G this is
GPTQ. The numbers of a tile are rounded together; of several scales each of its rows takes the one
that costs least.

Source: Frantar et al. 2023 (arXiv 2210.17323); Tseng et al. 2025 (arXiv 2505.22988) for both sides.
See docs/method.md, section 9, for the derivation and what is done differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ray_surgeon.maths.columns import upper_inverse
from ray_surgeon.maths.products import product

ROWS_TOGETHER = 64
"""Rows that are rounded without regard to one another's errors."""
FRACTIONS = (1.0, 0.925, 0.85, 0.775, 0.7)
"""Of the scale with which the largest number of a group just fits, which are tried."""
MAX_DAMPING = 1.0


@dataclass(frozen=True)
class Grid:
    """Numbers that can be stored: an integer times the scale of a row of a group."""

    num_bits: int  # of the signed integers
    group_size: int  # columns that share a scale

    @property
    def limit(self) -> float:
        """The largest of the integers is this less 1, the smallest minus this."""
        return 2.0 ** (self.num_bits - 1)

    def scales(self, groups: Tensor) -> Tensor:
        """Return scales [n, F, b] to try for numbers [n, b, size]."""
        fits = groups.abs().amax(dim=2) / (self.limit - 0.5)
        fits.clamp_(min=torch.finfo(torch.float32).tiny)
        return fits[:, None] * groups.new_tensor(FRACTIONS)[:, None]


@dataclass(frozen=True)
class Rounded:
    """A matrix of numbers that can be stored."""

    W: Tensor  # [R, C]
    scales: Tensor  # [R, C / group_size]


def round_linear(
    W: Tensor,
    A: Tensor,
    G: Tensor | None,
    grid: Grid,
    damping: tuple[float, float],
    name: str,
    *,
    ordered: bool = True,
) -> Rounded:
    """Round a linear so that its outputs, and by them the loss, change little.

    Args:
        W: [R, C] without bias.
        A: [C, C] mean second moment of the inputs.
        G: [R, R] second moment of the gradients at the outputs, up to a factor; None for the
            identity.
        grid: numbers that can be stored; its group_size divides C.
        damping: of A and of G, relative to the means of their diagonals.
        name: the linear, for errors.
        ordered: whether rows, groups of columns, and the columns of a group are rounded in
            descending order of the diagonals of G and A: what weighs most has most left that can
            answer its error. If not, the order is theirs.

    Raises:
        FloatingPointError: a factor has no inverse, see `factorise`.
    """
    size = grid.group_size
    rows = torch.arange(len(W), device=W.device)
    groups = torch.arange(len(A) // size, device=W.device)
    columns = torch.arange(len(A), device=W.device)
    if ordered:
        in_groups = A.diagonal().view(-1, size)
        groups = _descending(in_groups.mean(dim=1))
        columns = (groups[:, None] * size + _descending(in_groups[groups])).flatten()
        rows = rows if G is None else _descending(G.diagonal())
    U, _ = upper_inverse(A[columns][:, columns], damping[0], MAX_DAMPING, f"{name}: A")
    V = None
    if G is not None:
        V, _ = upper_inverse(G[rows][:, rows], damping[1], MAX_DAMPING, f"{name}: G")
    found = _in_order(W[rows][:, columns], U, V, grid)
    result = Rounded(torch.empty_like(found.W), torch.empty_like(found.scales))
    result.W[rows[:, None], columns] = found.W
    result.scales[rows[:, None], groups] = found.scales
    return result


def _descending(values: Tensor) -> Tensor:
    return values.argsort(dim=-1, descending=True, stable=True)


def _in_order(W: Tensor, U: Tensor, V: Tensor | None, grid: Grid) -> Rounded:
    """Round from the upper left to the lower right.

    With A^-1 = U^T U and G^-1 = V^T V, U and V upper triangular, and B = V with identities as its
    diagonal blocks, E is B^T P U. A tile of P follows from what is rounded there, once the tiles
    above it and to its left are known, so those of an antidiagonal are rounded together.

    Args:
        W: [R, C].
        U: [C, C], see `upper_inverse`.
        V: [R, R], likewise of G; None for the identity.
        grid: numbers that can be stored.
    """
    R, C = W.shape
    size = grid.group_size
    height = R if V is None else min(R, ROWS_TOGETHER)
    num_down = -(-R // height)
    num_across = C // size
    inner = torch.stack([U[s : s + size, s : s + size] for s in range(0, C, size)])
    below = [] if V is None else _answers_below(V, height)
    targets = pad(W, (0, 0, 0, num_down * height - R))  # W and what rows above answer
    left = torch.zeros_like(targets)  # what columns to the left answer: P U
    found = Rounded(torch.empty_like(targets), targets.new_empty(len(targets), num_across))
    tiles, answers, rounded, scales = (
        x.view(num_down, height, num_across, -1) for x in (targets, left, found.W, found.scales)
    )
    for wave in range(num_down + num_across - 1):
        i = list(range(max(0, wave - num_across + 1), min(num_down, wave + 1)))
        j = [wave - down for down in i]
        own = answers[i, :, j]
        rounded[i, :, j], P, scales[i, :, j] = _round_tiles(tiles[i, :, j] + own, inner[j], grid)
        own.baddbmm_(P, inner[j])
        for n, (down, across) in enumerate(zip(i, j, strict=True)):
            columns = slice(across * size, (across + 1) * size)
            rows = slice(down * height, (down + 1) * height)
            left[rows, columns.stop :] += product(P[n], U[columns, columns.stop :])
            if below and down < len(below):
                targets[rows.stop : R, columns] += product(below[down].T, own[n])
    return Rounded(found.W[:R], found.scales[:R])


def _answers_below(V: Tensor, height: int) -> list[Tensor]:
    """Return the part of B right of its diagonal [height, R - stop] for all but the last rows."""
    stops = range(height, len(V), height)
    return [
        torch.linalg.solve_triangular(
            V[stop - height : stop, stop - height : stop],
            V[stop - height : stop, stop:],
            upper=True,
        )
        for stop in stops
    ]


def _round_tiles(tiles: Tensor, U: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round tiles column by column with every scale, and keep the best of each row.

    Args:
        tiles: [n, b, size] what would be best without a grid.
        U: [n, size, size] diagonal blocks of U.
        grid: numbers that can be stored.

    Returns:
        [n, b, size] rounded tiles, and their P; [n, b, 1] scales.
    """
    scales = grid.scales(tiles)  # [n, F, b]
    # columns first: what a step reads and writes lies together
    present = tiles.permute(2, 0, 1)[:, :, None].expand(-1, *scales.shape).contiguous()
    U = U.permute(1, 2, 0)[..., None, None].contiguous()  # [size, size, n, 1, 1]
    rounded = torch.empty_like(present)
    P = torch.empty_like(present)
    for c in range(len(present)):
        torch.div(present[c], scales, out=rounded[c])
        rounded[c].round_().clamp_(-grid.limit, grid.limit - 1).mul_(scales)
        torch.sub(rounded[c], present[c], out=P[c]).div_(U[c, c])
        present[c + 1 :].addcmul_(P[c], U[c, c + 1 :])
    best = P.square().sum(dim=0).argmin(dim=1, keepdim=True)  # [n, 1, b]
    of_best = best.expand(len(present), *best.shape)
    W, P = (x.gather(2, of_best)[:, :, 0].permute(1, 2, 0) for x in (rounded, P))
    return W, P, scales.gather(1, best).mT
