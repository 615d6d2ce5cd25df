"""The method on one linear when single elements or N:M groups go.

Source: method.md sections 3 to 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.surgery.chunks import update_in_chunks
from ray_surgeon.surgery.conjugate import update_elements
from ray_surgeon.surgery.costs import quadratic_cost
from ray_surgeon.surgery.elements import element_costs, group_costs, pattern_removals, summed_group_costs
from ray_surgeon.surgery.kronecker import DampedFactor, KroneckerFactors, balanced, factorise
from ray_surgeon.surgery.masks import ElementMask
from ray_surgeon.surgery.threshold import check_costs


@dataclass(frozen=True)
class ElementUnits:
    """What is removed as one: single elements, or all but `n` of each group of `m` consecutive inputs of a row.

    Attributes:
        n: elements of a group that stay; 0 for single elements.
        m: elements of a group; 1 for single elements.
        joint: whether the cost of a group is the exact joint cost of its best pattern, or the sum of single costs.
    """

    n: int = 0
    m: int = 1
    joint: bool = True

    @property
    def num_removed(self) -> int:
        """Elements that go with one unit."""
        return self.m - self.n


@dataclass(frozen=True)
class ElementUpdate:
    """How kept elements make up for removed ones.

    Attributes:
        correlations: ``full``, ``single`` (every removed element's own correction, as if it went alone) or ``none``.
        solver: of full correlations: ``conjugate_gradients`` (all at once) or ``chunks`` (the paper's).
        num_iterations: of conjugate gradients, at most.
        tolerance: relative residual at which they stop.
        max_correlate: elements of a chunk.
        precision: dtype of the products in conjugate gradients, e.g. ``bfloat16``.
    """

    correlations: str
    solver: str
    num_iterations: int
    tolerance: float
    max_correlate: int
    precision: str


@dataclass(frozen=True)
class ElementCandidates:
    """What the costs of a linear's units follow from. Costs of single elements are not kept: they are as large as the weights.

    Attributes:
        row_scale: [R] and
        column_scale: [C]: the cost of element (r, c) is 1/2 W_rc^2 row_scale_r column_scale_c; zero on dead rows and columns.
        group_costs: [R, C / m] float32 costs of groups; empty for single elements.
        choice: [R, C / m] best pattern of every group; empty for single elements.
        damping_a: the relative damping that A needed.
        damping_g: the relative damping that G needed.
        float64_retry: whether A, and whether G, had to be factorised in float64.
    """

    row_scale: Tensor
    column_scale: Tensor
    group_costs: Tensor
    choice: Tensor
    damping_a: float
    damping_g: float
    float64_retry: tuple[bool, bool]


class ElementSurgery:
    """One linear in one shot, element by element."""

    def __init__(
        self,
        name: str,
        W: Tensor,
        factors: KroneckerFactors,
        mask: ElementMask,
        *,
        has_bias: bool,
        units: ElementUnits,
        damping_a: float,
        damping_g: float,
        max_damping: float,
    ) -> None:
        """Take the linear; see `LinearSurgery`. Groups start at column 0 and never reach the bias, which always stays."""
        self.name, self.W, self.has_bias, self.units = name, W, has_bias, units
        self.kept = mask.kept.to(W.device)
        self.num_inputs = W.shape[1] - has_bias
        self.live_rows = factors.G.diagonal() > 0
        self.live_columns = factors.A.diagonal() > 0
        alive = factors.restricted(self.live_rows, self.live_columns)
        A, G = balanced(alive.A / alive.num_tokens, alive.G / alive.num_tokens)
        self._A, self._G = A.to(W.dtype), G.to(W.dtype)
        self._damping = (damping_a, damping_g, max_damping)

    def _factorised(self, damping_a: float, damping_g: float) -> tuple[DampedFactor, DampedFactor]:
        cap = self._damping[2]
        return factorise(self._A, damping_a, cap, f"{self.name} A"), factorise(self._G, damping_g, cap, f"{self.name} G")

    def candidates(self, costs: str) -> ElementCandidates:
        """Return what the costs follow from.

        Args:
            costs: ``obs`` (the others make up for what goes) or ``obd`` (nothing does).

        Raises:
            FloatingPointError: a factor is not usable.
        """
        A, G = self._factorised(*self._damping[:2])
        row_scale, column_scale = torch.zeros_like(self.W[:, 0]), torch.zeros_like(self.W[0])
        if costs == "obs":
            row_scale[self.live_rows] = 1 / G.inverse_diagonal()
            column_scale[self.live_columns] = 1 / A.inverse_diagonal()
        else:
            row_scale[self.live_rows] = G.matrix.diagonal()
            column_scale[self.live_columns] = A.matrix.diagonal()
        by_group, choice = self._groups(A, row_scale, column_scale, joint=self.units.joint and costs == "obs")
        return ElementCandidates(row_scale, column_scale, by_group, choice, A.damping, G.damping, (A.float64_retry, G.float64_retry))

    def _groups(self, A: DampedFactor, row_scale: Tensor, column_scale: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
        n, m = self.units.n, self.units.m
        if m == 1:
            return self.W.new_zeros(0), self.W.new_zeros(0, dtype=torch.int64)
        W, columns = self.W[:, : self.num_inputs], self.live_columns[: self.num_inputs]
        if not joint:
            return summed_group_costs(element_costs(W, column_scale[: self.num_inputs], row_scale), n, m)
        inverse = torch.eye(self.num_inputs, dtype=W.dtype, device=W.device)
        inside = self.live_columns.nonzero()[:, 0] < self.num_inputs
        inverse[columns.nonzero(), columns.nonzero()[:, 0]] = torch.cholesky_inverse(A.cholesky)[inside][:, inside]
        by_group, choice = group_costs(W * columns, inverse, torch.ones_like(row_scale), n, m)
        return by_group * row_scale[:, None], choice

    def unit_costs(self, found: ElementCandidates) -> Tensor:
        """Return the costs [R, units a row] float32 of all units, infinite for those that may not go.

        Raises:
            FloatingPointError: a cost is not usable.
        """
        if self.units.m == 1:
            costs = element_costs(self.W, found.column_scale, found.row_scale)[:, : self.num_inputs].float()
            gone = ~self.kept[:, : self.num_inputs]
        else:
            costs = found.group_costs.float()
            groups = self.kept[:, : self.num_inputs].reshape(len(self.W), -1, self.units.m)
            gone = groups.sum(dim=2) <= self.units.n
        check_costs(self.name, costs[~gone])
        return costs.masked_fill(gone, torch.inf)

    def prune(self, found: ElementCandidates, threshold: float, update: ElementUpdate) -> tuple[Tensor, ElementMask, float, float]:
        """Remove every unit whose cost is at most the threshold and update what stays.

        Args:
            found: of this shot.
            threshold: the global one.
            update: how.

        Returns:
            W [R, C], the new mask, the predicted loss increase in nats per token, and the relative residual of the update's
            equations (0 for an exact one).
        """
        chosen = self.unit_costs(found).double() <= threshold
        removed = torch.zeros_like(self.kept)
        places = chosen if self.units.m == 1 else pattern_removals(chosen, found.choice, self.units.n, self.units.m)
        removed[:, : self.num_inputs] = places
        kept = self.kept & ~removed
        A, G = self._factorised(found.damping_a, found.damping_g)
        rows, columns = self.live_rows, self.live_columns
        before, stays = self.W[rows][:, columns], kept[rows][:, columns]
        after, residual = self._updated(before, A, G, stays, update)
        W = self.W * kept
        W[rows.nonzero(), columns.nonzero()[:, 0]] = after
        return W, ElementMask(kept.cpu()), quadratic_cost(after - before, A.matrix, G.matrix), residual

    def _updated(self, W: Tensor, A: DampedFactor, G: DampedFactor, kept: Tensor, update: ElementUpdate) -> tuple[Tensor, float]:
        if update.correlations == "none":
            return W * kept, 0.0
        if update.correlations == "full" and update.solver == "conjugate_gradients":
            return self._solved(W, A, G, kept, update)
        A_inverse, G_inverse = torch.cholesky_inverse(A.cholesky), torch.cholesky_inverse(G.cholesky)
        if update.correlations == "single":
            alone = W * ~kept / torch.outer(G_inverse.diagonal(), A_inverse.diagonal())
            return (W - G_inverse @ alone @ A_inverse) * kept, 0.0
        return update_in_chunks(W, A_inverse, G_inverse, ~kept & (W != 0), update.max_correlate) * kept, 0.0

    def _solved(self, W: Tensor, A: DampedFactor, G: DampedFactor, kept: Tensor, update: ElementUpdate) -> tuple[Tensor, float]:
        solution = update_elements(
            W,
            A.matrix,
            G.matrix,
            kept,
            num_iterations=update.num_iterations,
            tolerance=update.tolerance,
            product_dtype=getattr(torch, update.precision),
        )
        return solution.W, solution.residual
