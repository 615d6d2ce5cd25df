"""Costs of the coupled groups of several linears of one shape, on a device that is not the CPU.

What `ray_surgeon.maths.structured` does linear by linear is done for all at once, from the packed
factors to the marginal costs. Linears of which earlier shots left different numbers of columns have
zeros, and the identity in A, where others have columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature
from ray_surgeon.maths.downdated import Downdated
from ray_surgeon.maths.factorised import DampedFactor, factorise
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.greedy_batch import GreedyBatch
from ray_surgeon.maths.kronecker import balance_
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.maths.structured import alive_part, group_costs

BATCH_BYTES = 2**32
"""What the linears of one batch may take of the device together."""

KEPT_BYTES = 2**27
"""What Cholesky factors may take of a worker from one walk along the paths to the next."""


class KeptFactors(dict[str, DampedFactor]):
    """Consumer -> its factorised A, without the matrix, as far as there is room."""

    def keep(self, name: str, factor: DampedFactor) -> None:
        """Keep a factor, if all together take no more than `KEPT_BYTES`."""
        sizes = (kept.cholesky.nbytes for kept in (factor, *self.values()))
        if sum(sizes) <= KEPT_BYTES:
            self[name] = replace(factor, matrix=factor.matrix.new_empty(0, 0))


GroupResult = tuple[Basis, Tensor]
"""What costs of a linear's groups were taken on, and the costs."""


def costs_of_groups(
    linears: Sequence[Linear],
    masks: Sequence[StructuredMask],
    columns: Tensor,
    limits: Sequence[Limits],
    factors: KeptFactors | None = None,
) -> list[GroupResult]:
    """Return the `group_costs` of several consumers of one shape, and what they were taken on.

    Args:
        linears: the consumers.
        masks: what earlier shots kept of each, on the CPU.
        columns: [num_groups, width] columns of each group, the same for all, on the CPU.
        limits: how far the greedy paths are followed; single costs for all, or for none.
        factors: what an earlier call kept; the CPU takes and leaves factors there.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    if linears[0].W.device.type != "cpu" and most_at_once(*linears[0].W.shape):
        return batched_group_costs(linears, masks, columns, limits)
    costs = []
    for linear, mask, limit in zip(linears, masks, limits, strict=True):
        part = alive_part(linear, mask)
        kept = None if factors is None else factors.get(linear.name)
        if kept is None:
            curvature = LinearCurvature(linear, part)
        else:
            damping = replace(linear.damping, a=kept.damping)
            curvature = LinearCurvature(replace(linear, damping=damping), part)
            curvature.A = replace(kept, matrix=curvature.first[1])
        marginal = group_costs(curvature, columns, limit)
        if factors is not None and kept is None:
            factors.keep(linear.name, curvature.A)
        costs.append((curvature.basis_of_columns, marginal))
    return costs


def most_at_once(num_rows: int, num_columns: int) -> int:
    """Return how many linears of a shape make a batch, at most.

    None does if one is so large that launches are nothing beside its products: it goes as on the
    CPU, without the inverse, which takes a third of the memory.
    """
    return BATCH_BYTES // bytes_needed(num_rows, num_columns)


def bytes_needed(num_rows: int, num_columns: int) -> int:
    """Return the bytes that each linear of a batch takes, with its own weights and factors."""
    R = num_rows
    C = num_columns
    # dense G beside dense A and the weights, or A^-1 beside two triangular matrices
    return 4 * (4 * R * C + R**2 // 2 + C**2 + max(R**2 + 2 * C**2, 4 * C**2))


class _Layout(NamedTuple):
    """How the columns of one linear lie in the batch."""

    numbers: Tensor  # groups that have costs
    free: Tensor  # groups that cost nothing
    columns: Tensor  # [C] those of the groups that have costs, others that are alive, and the rest
    num_alive: int  # columns


def _layout(groups: Tensor, alive: Tensor, diagonal: Tensor, least: int) -> _Layout:
    """Return how the columns of a linear lie in the batch.

    Args:
        groups: [num_groups, width] columns of each group.
        alive: [C] bool.
        diagonal: [C] of A.
        least: so many groups stay.
    """
    left = alive[groups].all(dim=1)
    is_zero = left & (diagonal[groups] == 0).all(dim=1)
    free = is_zero.nonzero()[:, 0][: max(0, int(left.sum()) - least)]
    left[free] = False
    numbers = left.nonzero()[:, 0]
    first = groups[numbers].flatten()
    rank = torch.where(alive, 1, 2).index_fill_(0, first, 0)
    columns = torch.cat([first, rank.argsort(stable=True)[len(first) :]])
    return _Layout(numbers, free, columns, int(alive.sum()))


def _means(linears: Sequence[Linear], factor: str, device: torch.device) -> Tensor:
    """Return a factor, A or G, of each linear, [B, n, n], as a mean over tokens."""
    packed: list[PackedSymmetric] = [getattr(linear.factors, factor) for linear in linears]
    num_tokens = torch.tensor([float(linear.factors.num_tokens) for linear in linears]).to(device)
    if len(packed) == 1:
        dense = packed[0].dense(device)[None]
    else:
        flat = torch.stack([own.flat.to(device) for own in packed])
        # where in `flat` each entry is, asked of the packing itself
        numbers = torch.arange(flat.shape[1], dtype=torch.int32, device=device)
        places = PackedSymmetric(packed[0].n, numbers).dense()
        dense = flat.index_select(1, places.flatten()).view(len(packed), *places.shape)
    return dense.div_(num_tokens.to(dense.dtype)[:, None, None]).to(linears[0].W.dtype)


def _damp(matrices: Tensor, damping: Sequence[float], is_there: Tensor) -> Tensor:
    """Damp each matrix [n, n] by the mean of its diagonal, and return what the diagonals were.

    Args:
        matrices: [B, n, n].
        damping: of each.
        is_there: [B, n], 1 or 0. What is not there gets the mean itself.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    means = before.sum(dim=1, keepdim=True) / is_there.sum(dim=1, keepdim=True).clamp(min=1)
    factors = torch.tensor(damping, dtype=matrices.dtype).to(matrices.device)[:, None]
    diagonal.add_(means * (factors * is_there + (1 - is_there)))
    return before


def _roots(
    A: Tensor, before: Tensor, linears: Sequence[Linear], layouts: Sequence[_Layout]
) -> tuple[Tensor, list[DampedFactor | None]]:
    """Return lower L with L L^T = A, and the factors that were not positive definite as they were.

    Args:
        A: [B, n, n] damped.
        before: [B, n] diagonals without damping.
        linears: that they belong to.
        layouts: of the linears.

    Raises:
        FloatingPointError: see `factorise`.
    """
    L, failed = torch.linalg.cholesky_ex(A)
    is_bad = (failed > 0) | ~torch.isfinite(L.diagonal(dim1=1, dim2=2).sum(dim=1))
    factors: list[DampedFactor | None] = [None] * len(linears)
    for place in [place for place, bad in enumerate(is_bad.tolist()) if bad]:
        linear = linears[place]
        n = layouts[place].num_alive
        part = A[place, :n, :n].clone()
        part.diagonal().copy_(before[place, :n])
        damping = linear.damping
        factor = factorise(part, damping.a, damping.max, f"{linear.name} A")
        L[place] = torch.eye(len(L[place]), dtype=L.dtype, device=L.device)
        L[place, :n, :n] = factor.cholesky
        factors[place] = factor
    return L, factors


def _prepared(
    linears: Sequence[Linear], alive: Tensor, groups: Tensor, least: Sequence[int]
) -> tuple[Tensor, list[_Layout], Tensor, list[DampedFactor | None]]:
    """Balance, damp and factorise.

    Args:
        linears: of one shape.
        alive: [B, C] bool: columns that earlier shots kept, on the CPU.
        groups: see `batched_group_costs`.
        least: groups of each linear that stay.

    Returns:
        `tall` of `Downdated` for the columns in sets, layouts, rows with a gradient [B, R] bool,
        and the second of `_roots`.
    """
    device = linears[0].W.device
    R = len(linears[0].W)
    G, A = (_means(linears, factor, device) for factor in "GA")
    diagonals = A.diagonal(dim1=1, dim2=2).cpu()
    layouts = list(map(_layout, [groups] * len(linears), alive, diagonals, least))
    live_rows = G.diagonal(dim1=1, dim2=2) > 0
    W = torch.stack([linear.W for linear in linears]).mul_(live_rows[:, :, None])
    n = max(layout.num_alive for layout in layouts)
    num_alive = torch.tensor([[layout.num_alive] for layout in layouts]).to(device)
    is_there = (torch.arange(n, device=device) < num_alive).to(A.dtype)
    columns = torch.stack([layout.columns[:n] for layout in layouts])
    if W.shape[2] > n or bool((columns != torch.arange(n)).any()):
        columns = columns.to(device)
        W = W.gather(2, columns[:, None].expand(-1, R, -1))
        A = A.gather(1, columns[:, :, None].expand(-1, -1, A.shape[2]))
        A = A.gather(2, columns[:, None].expand(-1, n, -1))
        A.mul_(is_there[:, None]).mul_(is_there[:, :, None])
    balance_(A, G)
    _damp(G, [linear.damping.g for linear in linears], live_rows.to(G.dtype))
    before = _damp(A, [linear.damping.a for linear in linears], is_there)
    inside = groups.shape[1] * max(len(layout.numbers) for layout in layouts)
    tall = W.new_empty(len(W), 2 * R + inside, inside)
    tall[:, :R] = W[:, :, :inside]
    tall[:, R : 2 * R].baddbmm_(G, tall[:, :R], beta=0, alpha=0.5)
    del W, G
    L, factors = _roots(A, before, linears, layouts)
    del A
    # columns in no set never go, so that nothing of them is needed but their part in the inverse
    unit = torch.eye(n, inside, dtype=L.dtype, device=device).expand(len(L), -1, -1)
    X = torch.linalg.solve_triangular(L, unit, upper=False)
    del L
    tall[:, 2 * R :].baddbmm_(X.mT, X, beta=0)
    return tall, layouts, live_rows, factors


def batched_group_costs(
    linears: Sequence[Linear],
    masks: Sequence[StructuredMask],
    groups: Tensor,
    limits: Sequence[Limits],
) -> list[GroupResult]:
    """Return what `group_costs` does, for several linears of one shape.

    Args:
        linears: with W [R, C].
        masks: what earlier shots kept of each, on the CPU.
        groups: [num_groups, width] columns of each group, the same for all; on the CPU.
        limits: how far the greedy paths are followed; single costs for all, or for none.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    alive = torch.stack([mask.columns for mask in masks])
    least = [limit.least for limit in limits]
    tall, layouts, live_rows, factors = _prepared(linears, alive, groups, least)
    width = groups.shape[1]
    num_sets = tall.shape[2] // width
    marginal = tall.new_zeros(len(linears), 0)
    is_single = limits[0].limit is None
    if num_sets:
        may_prune = torch.stack([torch.arange(num_sets) < len(own.numbers) for own in layouts])
        state = Downdated(tall, None, len(linears[0].W), num_sets, width)
        names = [f"{linear.name} groups" for linear in linears]
        paths = GreedyBatch(state, may_prune, limits, names, is_padded=True)
        marginal = paths.single_costs() if is_single else paths.follow()
    results = []
    on_device = alive.to(tall.device)
    for place, own in enumerate(marginal.cpu()):
        layout = layouts[place]
        own = own[: len(layout.numbers)]
        if is_single:
            own[own.argsort(stable=True)[max(0, len(own) - least[place]) :]] = torch.inf
        costs = own.new_full((len(groups),), torch.inf)
        costs[layout.free] = 0.0
        costs[layout.numbers] = own
        part = StructuredMask(live_rows[place], on_device[place])
        results.append((_basis(linears[place], part, factors[place]), costs))
    return results


def _basis(linear: Linear, part: StructuredMask, factor: DampedFactor | None) -> Basis:
    """Return what the update needs; see `_roots`."""
    if factor is None:
        return Basis(part, linear.damping, (), ())
    damping = replace(linear.damping, a=factor.damping)
    return Basis(part, damping, factor.raised(linear.name, "A"), ())
