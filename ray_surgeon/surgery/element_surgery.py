"""The method on one linear when single elements or N:M groups go.

Source: method.md sections 3 to 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.surgery.chunks import update_in_chunks
from ray_surgeon.surgery.conjugate import Solution, update_elements
from ray_surgeon.surgery.curvature import LinearCurvature
from ray_surgeon.surgery.elements import element_costs, group_costs, pattern_removals, summed_group_costs
from ray_surgeon.surgery.kronecker import KroneckerFactors
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
        step: eta of the first-order correction in closed form, which goes into the same equations; 0 for none.
    """

    correlations: str
    solver: str
    num_iterations: int
    tolerance: float
    max_correlate: int
    precision: str
    step: float = 0.0


@dataclass(frozen=True)
class ElementCandidates:
    """What the costs of a linear's units follow from. With one Kronecker term, nothing as large as the weights is kept.

    Attributes:
        row_scale: [R, 1] or [R, C] and
        column_scale: [1, C] or [1, 1]: see `element_costs`; zero on dead rows and columns.
        group_costs: [R, C / m] float32 costs of groups; empty for single elements.
        choice: [R, C / m] best pattern of every group; empty for single elements.
        damping_a: the relative damping that A needed.
        damping_g: the relative damping that G needed.
        float64_retry: whether A, and whether G, had to be factorised in float64.
        clipping: of further Kronecker terms, see `ClippedTerm`.
    """

    row_scale: Tensor
    column_scale: Tensor
    group_costs: Tensor
    choice: Tensor
    damping_a: float
    damping_g: float
    float64_retry: tuple[bool, bool]
    clipping: tuple[float, ...] = ()


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
        self._factors, self._damping = factors, (damping_a, damping_g, max_damping)

    def _curvature(self, damping_a: float, damping_g: float) -> LinearCurvature:
        options = {"damping_a": damping_a, "damping_g": damping_g, "max_damping": self._damping[2]}
        return LinearCurvature(self.name, self._factors, self.live_rows, self.live_columns, dtype=self.W.dtype, **options)

    def candidates(self, costs: str) -> ElementCandidates:
        """Return what the costs follow from.

        Args:
            costs: ``obs`` (the others make up for what goes) or ``obd`` (nothing does).

        Raises:
            FloatingPointError: a factor is not usable.
        """
        curvature = self._curvature(*self._damping[:2])
        row_scale, column_scale = self._whole(*curvature.element_scales(costs))
        by_group, choice = self.W.new_zeros(0), self.W.new_zeros(0, dtype=torch.int64)
        if self.units.m > 1 and self.units.joint and costs == "obs":
            by_group, choice = self._joint_group_costs(curvature)
        elif self.units.m > 1:
            single = element_costs(self.W, row_scale, column_scale)[:, : self.num_inputs]
            by_group, choice = summed_group_costs(single, self.units.n, self.units.m)
        A, G = curvature.A, curvature.G
        retries = A.float64_retry, G.float64_retry
        return ElementCandidates(row_scale, column_scale, by_group, choice, A.damping, G.damping, retries, curvature.clipping)

    def _whole(self, row_scale: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Put scales of the live part into those of the whole linear, with zeros for the rest."""
        if row_scale.shape[1] > 1:
            whole = torch.zeros_like(self.W)
            whole[self.live_rows.nonzero(), self.live_columns.nonzero()[:, 0]] = row_scale * column_scale
            return whole, column_scale.new_ones(1, 1)
        rows, columns = self.W.new_zeros(len(self.live_rows), 1), self.W.new_zeros(1, len(self.live_columns))
        rows[self.live_rows], columns[:, self.live_columns] = row_scale, column_scale
        return rows, columns

    def _joint_group_costs(self, curvature: LinearCurvature) -> tuple[Tensor, Tensor]:
        n, m, alive = self.units.n, self.units.m, self.live_columns[: self.num_inputs]
        places = torch.where(alive, self.live_columns.cumsum(0)[: self.num_inputs] - 1, -1)
        W = self.W[self.live_rows][:, : self.num_inputs] * alive
        by_group, choice = self.W.new_zeros(len(self.W), self.num_inputs // m), self.W.new_zeros(1, dtype=torch.int64)
        choice = choice.expand(by_group.shape).clone()
        by_group[self.live_rows], choice[self.live_rows] = group_costs(W, *curvature.inverse_blocks(places.view(-1, m)), n, m)
        return by_group, choice

    def unit_costs(self, found: ElementCandidates) -> Tensor:
        """Return the costs [R, units a row] float32 of all units, infinite for those that may not go.

        Raises:
            FloatingPointError: a cost is not usable.
        """
        if self.units.m == 1:
            costs = element_costs(self.W, found.row_scale, found.column_scale)[:, : self.num_inputs].float()
            gone = ~self.kept[:, : self.num_inputs]
        else:
            costs = found.group_costs.float().clone()
            groups = self.kept[:, : self.num_inputs].reshape(len(self.W), -1, self.units.m)
            gone = groups.sum(dim=2) <= self.units.n
        check_costs(self.name, costs.masked_fill(gone, 0.0))
        return costs.masked_fill_(gone, torch.inf)

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
        chosen = self.unit_costs(found) <= threshold  # a float32 number, like the costs
        removed = torch.zeros_like(self.kept)
        places = chosen if self.units.m == 1 else pattern_removals(chosen, found.choice, self.units.n, self.units.m)
        removed[:, : self.num_inputs] = places
        kept = self.kept & ~removed
        curvature = self._curvature(found.damping_a, found.damping_g)
        rows, columns = self.live_rows, self.live_columns
        if rows.all() and columns.all():
            W, residual, predicted = self._updated(self.W, curvature, kept, update)
        else:
            W = self.W * kept
            after, residual, predicted = self._updated(self.W[rows][:, columns], curvature, kept[rows][:, columns], update)
            W[rows.nonzero(), columns.nonzero()[:, 0]] = after
        return W, ElementMask(kept.cpu()), predicted, residual

    def _updated(self, W: Tensor, curvature: LinearCurvature, kept: Tensor, update: ElementUpdate) -> tuple[Tensor, float, float]:
        """Return the new weights, the relative residual and the predicted loss increase."""
        if update.correlations == "full" and update.solver == "conjugate_gradients":
            solution = self._solved(W, curvature, kept, update)
            return solution.W, solution.residual, solution.predicted_loss_increase
        after = self._updated_directly(W, curvature, kept, update)
        return after, 0.0, curvature.quadratic_cost(after - W)

    def _updated_directly(self, W: Tensor, curvature: LinearCurvature, kept: Tensor, update: ElementUpdate) -> Tensor:
        if update.correlations == "none":
            return W * kept
        if update.correlations == "single" and curvature.is_extended:
            inverse = curvature.inverse
            return (W - inverse.solve(W * ~kept / inverse.diagonal())) * kept
        A_inverse, G_inverse = torch.cholesky_inverse(curvature.A.cholesky), torch.cholesky_inverse(curvature.G.cholesky)
        if update.correlations == "single":
            alone = W * ~kept / torch.outer(G_inverse.diagonal(), A_inverse.diagonal())
            return (W - G_inverse @ alone @ A_inverse) * kept
        return update_in_chunks(W, A_inverse, G_inverse, ~kept & (W != 0), update.max_correlate) * kept

    def _solved(self, W: Tensor, curvature: LinearCurvature, kept: Tensor, update: ElementUpdate) -> Solution:
        gradient = curvature.gradient
        return update_elements(
            W,
            curvature.terms,
            kept,
            gradient=None if gradient is None or update.step == 0 else update.step * gradient,
            num_iterations=update.num_iterations,
            tolerance=update.tolerance,
            product_dtype=getattr(torch, update.precision),
        )
