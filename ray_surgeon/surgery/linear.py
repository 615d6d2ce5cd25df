"""The method on one linear: which structures may go and at what cost, and what the rest becomes when some go.

Source: method.md sections 3 to 6. Costs and inverses are taken on the alive rows and columns only: a dead row makes G
singular, so it is cut first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.surgery.curvature import LinearCurvature
from ray_surgeon.surgery.greedy import GreedyCurve, greedy_costs
from ray_surgeon.surgery.kronecker import KroneckerFactors
from ray_surgeon.surgery.masks import StructuredMask
from ray_surgeon.surgery.threshold import check_costs


@dataclass(frozen=True)
class Candidates:
    """Rows and columns of one linear that may go.

    Attributes:
        rows: [p] indices of the rows that may go.
        columns: [q] indices of the columns that may go, never the bias's.
        row_costs: [p] costs, by which the threshold ranks; 0 for dead rows.
        column_costs: [q].
        live_rows: [R] bool, rows on which G is not degenerate.
        live_columns: [C] bool.
        damping_a: the relative damping that A on the live columns needed.
        damping_g: the relative damping that G on the live rows needed.
        float64_retry: whether A, and whether G, had to be factorised in float64.
        clipping: of further Kronecker terms, see `ClippedTerm`.
    """

    rows: Tensor
    columns: Tensor
    row_costs: Tensor
    column_costs: Tensor
    live_rows: Tensor
    live_columns: Tensor
    damping_a: float
    damping_g: float
    float64_retry: tuple[bool, bool]
    clipping: tuple[float, ...] = ()

    def gone(self, mask: StructuredMask, threshold: float) -> tuple[Tensor, Tensor]:
        """Return which rows [R] and columns [C] cost at most the threshold, as bools on the mask's device."""
        rows, columns = torch.zeros_like(mask.rows), torch.zeros_like(mask.columns)
        rows[self.rows[self.row_costs.double() <= threshold].to(rows.device)] = True
        columns[self.columns[self.column_costs.double() <= threshold].to(columns.device)] = True
        return rows, columns


class LinearSurgery:
    """One linear in one shot."""

    def __init__(
        self,
        name: str,
        W: Tensor,
        factors: KroneckerFactors,
        mask: StructuredMask,
        *,
        has_bias: bool,
        damping_a: float,
        damping_g: float,
        max_damping: float,
    ) -> None:
        """Take the linear.

        Args:
            name: for errors.
            W: [R, C] float32 or float64, the bias as the last column.
            factors: sums over the calibration tokens.
            mask: what earlier shots have kept.
            has_bias: whether the last column is a bias.
            damping_a: relative damping of A.
            damping_g: relative damping of G.
            max_damping: see `factorise`.
        """
        self.name, self.W, self.factors, self.has_bias = name, W, factors, has_bias
        self.mask = StructuredMask(mask.rows.to(W.device), mask.columns.to(W.device))
        self.damping_a, self.damping_g, self.max_damping = damping_a, damping_g, max_damping

    def candidates(self, structure: str, rank_by: str, costs: str = "obs", greedy_limit: float | None = None) -> Candidates:
        """Return what may go and its costs.

        Args:
            structure: ``rows``, ``columns`` or ``rows_columns``.
            rank_by: ``cost``, or ``cost_per_parameter``: divided by the entries that the structure still has.
            costs: ``obs`` (the others make up for what goes) or ``obd`` (nothing does).
            greedy_limit: if given, costs are the marginal ones of greedy removal, and only what goes up to this one is a candidate.

        Raises:
            FloatingPointError: a factor or a cost is not usable.
        """
        mask = self.mask
        live_rows = mask.rows & (self.factors.G.diagonal() > 0) & (self.W != 0).any(dim=1)
        live_columns = mask.columns & (self.factors.A.diagonal() > 0) & (self.W != 0).any(dim=0)
        if self.has_bias:
            live_columns[-1] = mask.columns[-1]
        curvature = self._curvature(live_rows, live_columns, self.damping_a, self.damping_g)
        W = self.W[live_rows][:, live_columns]
        rows, columns = mask.rows.clone(), mask.columns.clone()
        if self.has_bias:
            columns[-1] = False
        rows &= structure != "columns"
        columns &= structure != "rows"
        by_row, by_column = torch.zeros_like(self.W[:, 0]), torch.zeros_like(self.W[0])
        per_parameter = rank_by == "cost_per_parameter"
        if greedy_limit is not None:
            inverses = torch.cholesky_inverse(curvature.A.cholesky), torch.cholesky_inverse(curvature.G.cholesky)
            curve = GreedyCurve(W, curvature.A.matrix, curvature.G.matrix, *inverses)
            by_row[live_rows], by_column[live_columns] = greedy_costs(
                curve, rows[live_rows], columns[live_columns], per_parameter=per_parameter, limit=greedy_limit
            )
            rows &= torch.isfinite(by_row)
            columns &= torch.isfinite(by_column)
        else:
            by_row[live_rows], by_column[live_columns] = curvature.row_costs(W, costs), curvature.column_costs(W, costs)
            if per_parameter:
                by_row, by_column = by_row / mask.columns.sum().clamp(min=1), by_column / mask.rows.sum().clamp(min=1)
        check_costs(f"{self.name} rows", by_row[rows])
        check_costs(f"{self.name} columns", by_column[columns])
        return Candidates(
            rows.nonzero()[:, 0],
            columns.nonzero()[:, 0],
            by_row[rows],
            by_column[columns],
            live_rows,
            live_columns,
            curvature.A.damping,
            curvature.G.damping,
            (curvature.A.float64_retry, curvature.G.float64_retry),
            curvature.clipping,
        )

    def _curvature(self, rows: Tensor, columns: Tensor, damping_a: float, damping_g: float) -> LinearCurvature:
        options = {"damping_a": damping_a, "damping_g": damping_g, "max_damping": self.max_damping}
        return LinearCurvature(self.name, self.factors, rows, columns, dtype=self.W.dtype, **options)

    def prune(
        self, found: Candidates, threshold: float, joint: str, correlations: str = "full", step: float = 0.0
    ) -> tuple[Tensor, StructuredMask, float, float]:
        """Remove every candidate whose cost is at most the threshold and update what stays.

        Args:
            found: of this shot.
            threshold: the global one.
            joint: see `prune_rows_and_columns`.
            correlations: ``full``, ``single`` (see `prune_singly`) or ``none``: the others stay as they are (OBD).
            step: of the first-order correction, see `LinearCurvature.without`.

        Returns:
            W [R, C] with zeros in everything removed, the new mask, the predicted loss increase in nats per token, and the relative
            residual of the update's equations (0 for an exact one).
        """
        gone_rows, gone_columns = found.gone(self.mask, threshold)
        mask = self.mask.without(gone_rows, gone_columns)
        rows, columns = found.live_rows, found.live_columns
        curvature = self._curvature(rows, columns, found.damping_a, found.damping_g)
        before = self.W[rows][:, columns]
        gone = gone_rows[rows], gone_columns[columns]
        after, residual = curvature.without(before, *gone, joint=joint, correlations=correlations, step=step)
        predicted = curvature.quadratic_cost(after - before)
        W = self.W.clone()
        W[rows.nonzero(), columns.nonzero()[:, 0]] = after
        mask.apply_(W)
        return W, mask, predicted, residual
