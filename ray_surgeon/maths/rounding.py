"""Rounding of linears to few bits, where later numbers compensate for the errors of earlier ones.

With E = rounded W - W [R, C], the predicted loss increase is 1/2 tr(G E A E^T). Without G this is
GPTQ. The numbers of a tile are rounded together, with several scales; each row of the tile keeps
the scale with the smallest cost.

Source: Frantar et al. 2023 (arXiv 2210.17323); Tseng et al. 2025 (arXiv 2505.22988) for both sides.
See docs/method.md, section 9, for the derivation and the differences from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ray_surgeon.maths.columns import upper_inverse
from ray_surgeon.maths.products import product

ROWS_TOGETHER = 64
"""Rows that are rounded together, without compensating for one another's errors."""
FRACTIONS = (1.0, 0.925, 0.85, 0.775, 0.7)
"""Scales to try, as fractions of the one with which the largest number of a group just fits."""
MAX_DAMPING = 1.0


@dataclass(frozen=True)
class Grid:
    """Numbers that can be stored: an integer times the scale of a row of a group."""

    num_bits: int  # of the signed integers
    group_size: int  # columns that share a scale

    @property
    def limit(self) -> float:
        """The integers are at least -limit and at most limit - 1."""
        return 2.0 ** (self.num_bits - 1)

    def scales(self, groups: Tensor) -> Tensor:
        """Return the scales to try for each group.

        Args:
            groups: [n, b, size] numbers.

        Returns:
            [n, F, b], where F is the number of `FRACTIONS`.
        """
        largest = groups.abs().amax(dim=2) / (self.limit - 0.5)
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        return largest[:, None] * groups.new_tensor(FRACTIONS)[:, None]


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
    """Round a linear such that its outputs, and so the loss, change little.

    Args:
        W: [R, C] without bias.
        A: [C, C] mean second moment of the inputs.
        G: [R, R] second moment of the gradients at the outputs, up to a factor; None for the
            identity.
        grid: numbers that can be stored; its group_size divides C.
        damping: damping of A and of G, relative to the means of their diagonals.
        name: the linear, for errors.
        ordered: whether rows, groups of columns, and the columns of a group are rounded in
            descending order of the diagonals of G and A, so that most numbers are left to
            compensate for the errors that weigh most. Otherwise they are rounded as they are
            stored.

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
        if G is not None:
            rows = _descending(G.diagonal())
    damping_A, damping_G = damping
    U, _ = upper_inverse(A[columns][:, columns], damping_A, MAX_DAMPING, f"{name}: A")
    V = None
    if G is not None:
        V, _ = upper_inverse(G[rows][:, rows], damping_G, MAX_DAMPING, f"{name}: G")
    found = _in_order(W[rows][:, columns], U, V, grid)
    result = Rounded(torch.empty_like(found.W), torch.empty_like(found.scales))
    result.W[rows[:, None], columns] = found.W
    result.scales[rows[:, None], groups] = found.scales
    return result


def _descending(values: Tensor) -> Tensor:
    return values.argsort(dim=-1, descending=True, stable=True)


def _in_order(W: Tensor, U: Tensor, V: Tensor | None, grid: Grid) -> Rounded:
    """Round from the upper left to the lower right.

    Let A^-1 = U^T U and G^-1 = V^T V with U and V upper triangular, and let B be V with identities
    as its diagonal blocks. Then E is B^T P U. A tile of P follows from its rounded numbers once the
    tiles above it and to its left are known, so the tiles of an antidiagonal are rounded together.

    Args:
        W: [R, C].
        U: [C, C], see `upper_inverse`.
        V: [R, R], the same for G; None for the identity.
        grid: numbers that can be stored.
    """
    R, C = W.shape
    size = grid.group_size
    height = R
    below = []
    if V is not None:
        height = min(R, ROWS_TOGETHER)
        below = _blocks_right_of_diagonal(V, height)
    num_down = -(-R // height)
    num_across = C // size
    inner = torch.stack(
        [U[start : start + size, start : start + size] for start in range(0, C, size)]
    )
    # W with corrections from the rows above
    targets = pad(W, (0, 0, 0, num_down * height - R))
    carried = torch.zeros_like(targets)  # corrections from the columns to the left: P U
    rounded = torch.empty_like(targets)
    scales = targets.new_empty(len(targets), num_across)
    tiles = targets.view(num_down, height, num_across, size)
    carried_tiles = carried.view(num_down, height, num_across, size)
    rounded_tiles = rounded.view(num_down, height, num_across, size)
    scale_tiles = scales.view(num_down, height, num_across, 1)
    for wave in range(num_down + num_across - 1):
        down = list(range(max(0, wave - num_across + 1), min(num_down, wave + 1)))
        across = [wave - i for i in down]
        own = carried_tiles[down, :, across]
        new, P, new_scales = _round_tiles(
            tiles[down, :, across] + own, inner[across], grid
        )
        rounded_tiles[down, :, across] = new
        scale_tiles[down, :, across] = new_scales
        own.baddbmm_(P, inner[across])
        for n, (i, j) in enumerate(zip(down, across, strict=True)):
            rows = slice(i * height, (i + 1) * height)
            columns = slice(j * size, (j + 1) * size)
            carried[rows, columns.stop :] += product(P[n], U[columns, columns.stop :])
            if i < len(below):
                targets[rows.stop : R, columns] += product(below[i].T, own[n])
    return Rounded(W=rounded[:R], scales=scales[:R])


def _blocks_right_of_diagonal(V: Tensor, height: int) -> list[Tensor]:
    """Return the part of B right of its diagonal block for each block of rows but the last one.

    Args:
        V: [R, R], see `_in_order`.
        height: rows of a block.

    Returns:
        Tensors [height, R - stop], where stop is the end of the block of rows.
    """
    blocks = []
    for stop in range(height, len(V), height):
        start = stop - height
        diagonal_block = V[start:stop, start:stop]
        right = V[start:stop, stop:]
        blocks.append(torch.linalg.solve_triangular(diagonal_block, right, upper=True))
    return blocks


def _round_tiles(tiles: Tensor, U: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round tiles column by column with every scale, and keep the best scale of each row.

    Args:
        tiles: [n, b, size] the numbers to round.
        U: [n, size, size] diagonal blocks of U.
        grid: numbers that can be stored.

    Returns:
        [n, b, size] rounded tiles, [n, b, size] their P, and [n, b, 1] scales.
    """
    scales = grid.scales(tiles)  # [n, F, b]
    # columns come first, so that each step reads and writes contiguous memory
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
    chosen = best.expand(len(present), *best.shape)
    best_rounded = rounded.gather(2, chosen)[:, :, 0].permute(1, 2, 0)
    best_P = P.gather(2, chosen)[:, :, 0].permute(1, 2, 0)
    return best_rounded, best_P, scales.gather(1, best).mT
