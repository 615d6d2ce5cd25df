"""Costs of the coupled groups of several linears of one shape, on a device that is not the CPU.

`ray_surgeon.maths.structured` takes one linear after the other; this module takes all of them at
once, from the packed factors to the marginal costs. Where earlier shots left fewer columns of one
linear than of others, its matrices are padded with zeros, and its A with the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature
from ray_surgeon.maths.downdated import Downdated
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.greedy_batch import GreedyBatch
from ray_surgeon.maths.kronecker import DampedFactor, balance_, factorise
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.maths.structured import alive_part, group_costs

BATCH_BYTES = 2**32
"""Device memory that the linears of one batch may take together."""

KEPT_BYTES = 2**27
"""Memory of a worker that Cholesky factors may take from one call to the next."""


class KeptFactors(dict[str, DampedFactor]):
    """Maps a consumer to its factorised A, without the matrix, as far as there is room."""

    def keep(self, name: str, factor: DampedFactor) -> None:
        """Keep a factor, unless all of them together would take more than `KEPT_BYTES`."""
        total_bytes = factor.cholesky.nbytes
        for kept in self.values():
            total_bytes += kept.cholesky.nbytes
        if total_bytes <= KEPT_BYTES:
            self[name] = replace(factor, matrix=factor.matrix.new_empty(0, 0))


GroupResult = tuple[Basis, Tensor]
"""The basis on which the costs of a linear's groups were computed, and the costs."""


def costs_of_groups(
    linears: Sequence[Linear],
    masks: Sequence[StructuredMask],
    columns: Tensor,
    limits: Sequence[Limits],
    factors: KeptFactors | None = None,
) -> list[GroupResult]:
    """Return the `group_costs` of several consumers of one shape, each with its basis.

    Args:
        linears: the consumers.
        masks: rows and columns of each that earlier shots kept, on the CPU.
        columns: [num_groups, width] columns of each group, the same for all, on the CPU.
        limits: how far the greedy paths are followed; single costs for all, or for none.
        factors: factors kept by an earlier call; read and extended on the CPU only.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    num_rows, num_columns = linears[0].W.shape
    is_on_cpu = linears[0].W.device.type == "cpu"
    if not is_on_cpu and most_at_once(num_rows, num_columns):
        return batched_group_costs(linears, masks, columns, limits)
    results = []
    for linear, mask, limit in zip(linears, masks, limits, strict=True):
        part = alive_part(linear, mask)
        kept = None
        if factors is not None:
            kept = factors.get(linear.name)
        if kept is None:
            curvature = LinearCurvature(linear, part)
        else:
            damping = replace(linear.damping, a=kept.damping)
            curvature = LinearCurvature(replace(linear, damping=damping), part)
            curvature.A = replace(kept, matrix=curvature.first[1])
        costs = group_costs(curvature, columns, limit)
        if factors is not None and kept is None:
            factors.keep(linear.name, curvature.A)
        results.append((curvature.basis_of_columns, costs))
    return results


def most_at_once(num_rows: int, num_columns: int) -> int:
    """Return the largest number of linears [num_rows, num_columns] in a batch.

    It is 0 if a linear is so large that the time of its launches is negligible beside that of its
    products. Such a linear is handled as on the CPU: without the inverse, in a third of the memory.
    """
    return BATCH_BYTES // bytes_needed(num_rows, num_columns)


def bytes_needed(num_rows: int, num_columns: int) -> int:
    """Return the bytes that each linear of a batch takes, with its weights and factors."""
    R = num_rows
    C = num_columns
    # dense G beside dense A and the weights, or A^-1 beside two triangular matrices
    return 4 * (4 * R * C + R**2 // 2 + C**2 + max(R**2 + 2 * C**2, 4 * C**2))


class _Layout(NamedTuple):
    """Order of the columns of one linear in the batch."""

    numbers: Tensor  # groups that have costs
    free: Tensor  # groups that cost nothing
    # [C] columns of the groups with costs, other alive columns, and the rest
    columns: Tensor
    num_alive: int  # alive columns


def _layout(groups: Tensor, alive: Tensor, diagonal: Tensor, least: int) -> _Layout:
    """Return the order of the columns of one linear in the batch.

    Args:
        groups: [num_groups, width] columns of each group.
        alive: [C] bool.
        diagonal: [C] of A.
        least: number of groups that stay.
    """
    left = alive[groups].all(dim=1)
    is_zero = left & (diagonal[groups] == 0).all(dim=1)
    max_free = max(0, int(left.sum()) - least)
    free = is_zero.nonzero()[:, 0][:max_free]
    left[free] = False
    numbers = left.nonzero()[:, 0]
    first = groups[numbers].flatten()
    rank = torch.where(alive, 1, 2).index_fill_(0, first, 0)
    columns = torch.cat([first, rank.argsort(stable=True)[len(first) :]])
    return _Layout(
        numbers=numbers, free=free, columns=columns, num_alive=int(alive.sum())
    )


def _means(packed: Sequence[PackedSymmetric], linears: Sequence[Linear]) -> Tensor:
    """Return the sums of one factor of each linear as means over tokens, [B, n, n]."""
    device = linears[0].W.device
    counts = [float(linear.factors.num_tokens) for linear in linears]
    num_tokens = torch.tensor(counts).to(device)
    if len(packed) == 1:
        dense = packed[0].dense(device)[None]
    else:
        flat = torch.stack([factor.flat.to(device) for factor in packed])
        # packing numbers instead of entries shows where in `flat` each entry is
        numbers = torch.arange(flat.shape[1], dtype=torch.int32, device=device)
        places = PackedSymmetric(packed[0].n, numbers).dense()
        dense = flat.index_select(1, places.flatten()).view(len(packed), *places.shape)
    return dense.div_(num_tokens.to(dense.dtype)[:, None, None]).to(linears[0].W.dtype)


def _damp(matrices: Tensor, damping: Sequence[float], exists: Tensor) -> Tensor:
    """Damp each matrix in place by the mean of its diagonal, and return the diagonals from before.

    Args:
        matrices: [B, n, n].
        damping: damping of each, relative to the mean.
        exists: [B, n], 1 or 0 for padding, whose diagonal becomes the mean itself.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    counts = exists.sum(dim=1, keepdim=True).clamp(min=1)
    means = before.sum(dim=1, keepdim=True) / counts
    factors = torch.tensor(damping, dtype=matrices.dtype).to(matrices.device)[:, None]
    diagonal.add_(means * (factors * exists + (1 - exists)))
    return before


def _decompose(
    A: Tensor, before: Tensor, linears: Sequence[Linear], layouts: Sequence[_Layout]
) -> tuple[Tensor, list[DampedFactor | None]]:
    """Decompose A of each linear.

    Args:
        A: [B, n, n] damped.
        before: [B, n] diagonals without damping.
        linears: the linears.
        layouts: layouts of the linears.

    Returns:
        [B, n, n] lower L with L L^T = A, and for each linear the result of `factorise` if its A was
        not positive definite, otherwise None.

    Raises:
        FloatingPointError: see `factorise`.
    """
    L, failed = torch.linalg.cholesky_ex(A)
    is_bad = (failed > 0) | ~torch.isfinite(L.diagonal(dim1=1, dim2=2).sum(dim=1))
    factors: list[DampedFactor | None] = [None] * len(linears)
    for place, bad in enumerate(is_bad.tolist()):
        if not bad:
            continue
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


class _Batch(NamedTuple):
    """The linears, balanced, damped and factorised."""

    tall: Tensor  # `tall` of `Downdated` for the columns in sets
    layouts: list[_Layout]
    live_rows: Tensor  # [B, R] bool, rows with a gradient
    factors: list[DampedFactor | None]  # see `_decompose`


def _prepare(
    linears: Sequence[Linear], alive: Tensor, groups: Tensor, least: Sequence[int]
) -> _Batch:
    """Balance, damp and factorise.

    Args:
        linears: linears of one shape.
        alive: [B, C] bool: columns that earlier shots kept, on the CPU.
        groups: see `batched_group_costs`.
        least: groups of each linear that stay.
    """
    device = linears[0].W.device
    R = len(linears[0].W)
    G = _means([linear.factors.G for linear in linears], linears)
    A = _means([linear.factors.A for linear in linears], linears)
    diagonals = A.diagonal(dim1=1, dim2=2).cpu()
    layouts = []
    for number, (own_alive, diagonal) in enumerate(zip(alive, diagonals, strict=True)):
        layouts.append(_layout(groups, own_alive, diagonal, least[number]))
    live_rows = G.diagonal(dim1=1, dim2=2) > 0
    W = torch.stack([linear.W for linear in linears]).mul_(live_rows[:, :, None])
    counts = [layout.num_alive for layout in layouts]
    n = max(counts)
    num_alive = torch.tensor(counts)[:, None].to(device)
    exists = (torch.arange(n, device=device) < num_alive).to(A.dtype)
    columns = torch.stack([layout.columns[:n] for layout in layouts])
    if W.shape[2] > n or bool((columns != torch.arange(n)).any()):
        columns = columns.to(device)
        W = W.gather(2, columns[:, None].expand(-1, R, -1))
        A = A.gather(1, columns[:, :, None].expand(-1, -1, A.shape[2]))
        A = A.gather(2, columns[:, None].expand(-1, n, -1))
        A.mul_(exists[:, None]).mul_(exists[:, :, None])
    balance_(A, G)
    _damp(G, [linear.damping.g for linear in linears], live_rows.to(G.dtype))
    before = _damp(A, [linear.damping.a for linear in linears], exists)
    max_groups = max(len(layout.numbers) for layout in layouts)
    num_inside = groups.shape[1] * max_groups
    tall = W.new_empty(len(W), 2 * R + num_inside, num_inside)
    tall[:, :R] = W[:, :, :num_inside]
    tall[:, R : 2 * R].baddbmm_(G, tall[:, :R], beta=0, alpha=0.5)
    del W, G
    L, factors = _decompose(A, before, linears, layouts)
    del A
    # columns in no set are never pruned: only their part in the inverse is needed
    unit = torch.eye(n, num_inside, dtype=L.dtype, device=device).expand(len(L), -1, -1)
    X = torch.linalg.solve_triangular(L, unit, upper=False)
    del L
    tall[:, 2 * R :].baddbmm_(X.mT, X, beta=0)
    return _Batch(tall=tall, layouts=layouts, live_rows=live_rows, factors=factors)


def batched_group_costs(
    linears: Sequence[Linear],
    masks: Sequence[StructuredMask],
    groups: Tensor,
    limits: Sequence[Limits],
) -> list[GroupResult]:
    """Return the results of `group_costs` for several linears of one shape.

    Args:
        linears: linears with W [R, C].
        masks: rows and columns of each that earlier shots kept, on the CPU.
        groups: [num_groups, width] columns of each group, the same for all; on the CPU.
        limits: how far the greedy paths are followed; single costs for all, or for none.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    alive = torch.stack([mask.columns for mask in masks])
    least = [limit.least for limit in limits]
    batch = _prepare(linears, alive, groups, least)
    marginal = _marginal_costs(linears, batch, groups.shape[1], limits).cpu()
    is_single = limits[0].limit is None
    on_device = alive.to(batch.tall.device)
    results = []
    for place, layout in enumerate(batch.layouts):
        own = marginal[place, : len(layout.numbers)]
        if is_single:
            num_pruned = max(0, len(own) - least[place])
            own[own.argsort(stable=True)[num_pruned:]] = torch.inf
        costs = own.new_full((len(groups),), torch.inf)
        costs[layout.free] = 0.0
        costs[layout.numbers] = own
        part = StructuredMask(batch.live_rows[place], on_device[place])
        basis = _basis(linears[place], part, batch.factors[place])
        results.append((basis, costs))
    return results


def _marginal_costs(
    linears: Sequence[Linear], batch: _Batch, width: int, limits: Sequence[Limits]
) -> Tensor:
    """Return the costs of the groups in `_Layout.numbers`, [B, max_groups]."""
    num_sets = batch.tall.shape[2] // width
    if not num_sets:
        return batch.tall.new_zeros(len(linears), 0)
    every = torch.arange(num_sets)
    may_prune = torch.stack([every < len(layout.numbers) for layout in batch.layouts])
    state = Downdated(
        tall=batch.tall,
        wide=None,
        num_rows=len(linears[0].W),
        num_sets=num_sets,
        width=width,
    )
    names = [f"{linear.name} groups" for linear in linears]
    paths = GreedyBatch(state, may_prune, limits, names, is_padded=True)
    if limits[0].limit is None:
        return paths.single_costs()
    return paths.follow()


def _basis(linear: Linear, part: StructuredMask, factor: DampedFactor | None) -> Basis:
    """Return the basis of an update; see `_decompose` for the factor."""
    if factor is None:
        return Basis(part, linear.damping, (), ())
    damping = replace(linear.damping, a=factor.damping)
    return Basis(part, damping, factor.raised(linear.name, "A"), ())
