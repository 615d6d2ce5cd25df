"""The method on one linear: which structures may go and at what cost, and what the rest becomes when some go.

Source: method.md sections 3 to 6. Costs and inverses are taken on the alive rows and columns only: a dead row makes G
singular, so it is cut first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.surgery.costs import column_costs, diagonal_column_costs, diagonal_row_costs, quadratic_cost, row_costs
from ray_surgeon.surgery.kronecker import KroneckerFactors, balanced, damped, factorise
from ray_surgeon.surgery.masks import StructuredMask
from ray_surgeon.surgery.threshold import check_costs
from ray_surgeon.surgery.updates import prune_rows_and_columns, prune_singly


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

    def candidates(self, structure: str, rank_by: str, costs: str = "obs") -> Candidates:
        """Return what may go and its costs.

        Args:
            structure: ``rows``, ``columns`` or ``rows_columns``.
            rank_by: ``cost``, or ``cost_per_parameter``: divided by the entries that the structure still has.
            costs: ``obs`` (the others make up for what goes) or ``obd`` (nothing does).

        Raises:
            FloatingPointError: a factor or a cost is not usable.
        """
        mask = self.mask
        live_rows = mask.rows & (self.factors.G.diagonal() > 0) & (self.W != 0).any(dim=1)
        live_columns = mask.columns & (self.factors.A.diagonal() > 0) & (self.W != 0).any(dim=0)
        if self.has_bias:
            live_columns[-1] = mask.columns[-1]
        mean_A, mean_G = self._means(live_rows, live_columns)
        A = factorise(mean_A, self.damping_a, self.max_damping, f"{self.name} A")
        G = factorise(mean_G, self.damping_g, self.max_damping, f"{self.name} G")
        W = self.W[live_rows][:, live_columns]
        by_row, by_column = torch.zeros_like(self.W[:, 0]), torch.zeros_like(self.W[0])
        if costs == "obs":
            by_row[live_rows] = row_costs(W, A.matrix, G.inverse_diagonal())
            by_column[live_columns] = column_costs(W, G.matrix, A.inverse_diagonal())
        else:
            by_row[live_rows] = diagonal_row_costs(W, A.matrix, G.matrix.diagonal())
            by_column[live_columns] = diagonal_column_costs(W, G.matrix, A.matrix.diagonal())
        if rank_by == "cost_per_parameter":
            by_row, by_column = by_row / mask.columns.sum().clamp(min=1), by_column / mask.rows.sum().clamp(min=1)
        rows, columns = mask.rows.clone(), mask.columns.clone()
        if self.has_bias:
            columns[-1] = False
        rows &= structure != "columns"
        columns &= structure != "rows"
        check_costs(f"{self.name} rows", by_row[rows])
        check_costs(f"{self.name} columns", by_column[columns])
        return Candidates(
            rows.nonzero()[:, 0],
            columns.nonzero()[:, 0],
            by_row[rows],
            by_column[columns],
            live_rows,
            live_columns,
            A.damping,
            G.damping,
            (A.float64_retry, G.float64_retry),
        )

    def _means(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and G on the live rows and columns as means over tokens, so that costs are in nats per token."""
        alive = self.factors.restricted(rows, columns)
        A, G = balanced(alive.A / alive.num_tokens, alive.G / alive.num_tokens)
        return A.to(self.W.dtype), G.to(self.W.dtype)

    def prune(self, found: Candidates, threshold: float, joint: str, correlations: str = "full") -> tuple[Tensor, StructuredMask, float]:
        """Remove every candidate whose cost is at most the threshold and update what stays.

        Args:
            found: of this shot.
            threshold: the global one.
            joint: see `prune_rows_and_columns`.
            correlations: ``full``, ``single`` (see `prune_singly`) or ``none``: the others stay as they are (OBD).

        Returns:
            W [R, C] with zeros in everything removed, the new mask, and the predicted loss increase in nats per token.
        """
        gone_rows, gone_columns = torch.zeros_like(self.mask.rows), torch.zeros_like(self.mask.columns)
        gone_rows[found.rows[found.row_costs.double() <= threshold]] = True
        gone_columns[found.columns[found.column_costs.double() <= threshold]] = True
        mask = self.mask.without(gone_rows, gone_columns)
        rows, columns = found.live_rows, found.live_columns
        mean_A, mean_G = self._means(rows, columns)
        A, G = damped(mean_A, found.damping_a), damped(mean_G, found.damping_g)
        before = self.W[rows][:, columns]
        gone = gone_rows[rows], gone_columns[columns]
        if correlations == "full":
            after = prune_rows_and_columns(before, A, G, *gone, joint=joint, name=self.name)
        elif correlations == "single":
            A_inverse, G_inverse = (torch.cholesky_inverse(factorise(x, 0.0, 0.0, self.name).cholesky) for x in (A, G))
            after = prune_singly(before, A_inverse, G_inverse, *gone)
        else:
            after = before * torch.outer(~gone[0], ~gone[1])
        predicted = quadratic_cost(after - before, A, G)
        W = self.W.clone()
        W[rows.nonzero(), columns.nonzero()[:, 0]] = after
        mask.apply_(W)
        return W, mask, predicted
