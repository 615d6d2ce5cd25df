"""Single elements or N:M groups of one linear: costs, and the update.

Source: docs/method.md, sections 3 to 6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ray_surgeon.maths.conjugate import update_elements
from ray_surgeon.maths.curvature import Clipping, LinearCurvature, RaisedDamping
from ray_surgeon.maths.element_costs import (
    element_costs,
    group_costs,
    pattern_removals,
    summed_group_costs,
)
from ray_surgeon.maths.kronecker import Damping
from ray_surgeon.maths.linear import Linear, Part, Removal
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.maths.threshold import check_costs


@dataclass(frozen=True)
class ElementUnits:
    """What is pruned as one: single elements, or all but `n` of `m` inputs of a row."""

    n: int = 0  # elements of a group that stay; 0 for single elements
    m: int = 1  # elements of a group; 1 for single elements
    # whether the cost of a group is the exact joint cost of its best pattern, or the sum of single
    # costs
    joint: bool = True

    @property
    def num_removed(self) -> int:
        """Elements that are pruned with one unit."""
        return self.m - self.n


@dataclass(frozen=True)
class ElementUpdate:
    """How kept elements make up for pruned ones.

    Attributes:
        solver: ``conjugate_gradients`` (all correlations at once), ``single`` (the correction of
            every pruned element as if it were pruned alone) or ``none``.
        num_iterations: of conjugate gradients, at most.
        tolerance: relative residual at which they stop.
        precision: dtype of their products, e.g. ``bfloat16``.
    """

    solver: str
    num_iterations: int = 0
    tolerance: float = 0.0
    precision: str = "float32"


@dataclass(frozen=True)
class ElementCandidates:
    """What the costs of a linear's units follow from.

    With one Kronecker term, nothing as large as the weights is kept.
    """

    row_scale: Tensor  # [R, 1] or [R, C] and
    # [1, C] or [1, 1]: see `element_costs`; zero where an input or a gradient is always zero
    column_scale: Tensor
    group_costs: Tensor  # [R, C / m] float32 costs of groups; empty for single elements
    choice: Tensor  # [R, C / m] best pattern of every group; empty for single elements
    live: Part  # rows and columns on which the curvature is not degenerate
    damping: Damping  # what the factors on `live` needed
    raised_damping: tuple[RaisedDamping, ...]  # see `LinearCurvature`
    clipping: tuple[Clipping, ...]  # see `LinearCurvature`


def find_elements(linear: Linear, units: ElementUnits, costs: str) -> ElementCandidates:
    """Return what the costs of all units follow from.

    Args:
        linear: groups start at column 0 and never reach the bias, which always stays.
        units: what is pruned as one.
        costs: ``obs`` (with the optimal update of the others) or ``obd`` (without one).

    Raises:
        FloatingPointError: a factor is not usable.
    """
    live = linear.live
    curvature = linear.curvature(live)
    row_scale, column_scale = _scales(linear, live, *curvature.element_scales(costs))
    by_group = linear.W.new_zeros(0)
    choice = linear.W.new_zeros(0, dtype=torch.int64)
    if units.m > 1 and units.joint and costs == "obs":
        by_group, choice = _joint_group_costs(linear, live, curvature, units)
    elif units.m > 1:
        single = element_costs(linear.W, row_scale, column_scale)[:, : linear.num_inputs]
        by_group, choice = summed_group_costs(single, units.n, units.m)
    about = curvature.used_damping, curvature.raised_damping, curvature.clipping
    return ElementCandidates(row_scale, column_scale, by_group, choice, live, *about)


def _scales(
    linear: Linear, live: Part, row_scale: Tensor, column_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Put scales of the live part into those of the whole linear, with zeros for the rest."""
    if row_scale.shape[1] != 1:
        return live.put(row_scale * column_scale, linear.zeros()), column_scale.new_ones(1, 1)
    rows = linear.W.new_zeros(len(live.rows), 1)
    columns = linear.W.new_zeros(1, len(live.columns))
    rows[live.rows] = row_scale
    columns[:, live.columns] = column_scale
    return rows, columns


def _joint_group_costs(
    linear: Linear, live: Part, curvature: LinearCurvature, units: ElementUnits
) -> tuple[Tensor, Tensor]:
    n = units.n
    m = units.m
    alive = live.columns[: linear.num_inputs]
    places = torch.where(alive, live.columns.cumsum(0)[: linear.num_inputs] - 1, -1)
    W = linear.W[live.rows][:, : linear.num_inputs] * alive
    by_group = linear.W.new_zeros(len(linear.W), linear.num_inputs // m)
    choice = torch.zeros_like(by_group, dtype=torch.int64)
    if not alive.any():
        return by_group, choice
    by_group[live.rows], choice[live.rows] = group_costs(
        W, *curvature.inverse_blocks(places.view(-1, m)), n, m
    )
    return by_group, choice


def unit_costs(
    linear: Linear, mask: ElementMask, units: ElementUnits, candidates: ElementCandidates
) -> Tensor:
    """Return the costs [R, units a row] float32 of all units.

    Those that may not be pruned have infinity.

    Raises:
        FloatingPointError: a cost is not usable.
    """
    kept = mask.kept.to(linear.W.device)[:, : linear.num_inputs]
    if units.m == 1:
        costs = element_costs(linear.W, candidates.row_scale, candidates.column_scale)[
            :, : linear.num_inputs
        ].float()
        excluded = ~kept
    else:
        costs = candidates.group_costs.float().clone()
        excluded = kept.reshape(len(kept), -1, units.m).sum(dim=2) <= units.n
    check_costs(linear.name, costs.masked_fill(excluded, 0.0))
    return costs.masked_fill_(excluded, torch.inf)


def prune_elements(
    linear: Linear,
    mask: ElementMask,
    units: ElementUnits,
    candidates: ElementCandidates,
    threshold: float,
    update: ElementUpdate,
) -> tuple[Removal, ElementMask]:
    """Prune every unit whose cost is at most the threshold and update what stays.

    Args:
        linear: as for `find_elements`.
        mask: what earlier shots kept.
        units: likewise.
        candidates: of this shot.
        threshold: the global one, a float32 number like the costs.
        update: how.
    """
    chosen = unit_costs(linear, mask, units, candidates) <= threshold
    to_prune = linear.zeros(torch.bool)
    to_prune[:, : linear.num_inputs] = (
        chosen if units.m == 1 else pattern_removals(chosen, candidates.choice, units.n, units.m)
    )
    kept = mask.kept.to(to_prune.device) & ~to_prune
    curvature = linear.curvature(candidates.live, candidates.damping)
    live = candidates.live
    if live.rows.all() and live.columns.all():
        removal = _updated(linear.W, curvature, kept, update)
    else:
        removal = _updated(live.of(linear.W), curvature, live.of(kept), update)
        removal = replace(removal, W=live.put(removal.W, linear.W * kept))
    return removal, ElementMask(kept.cpu())


def _updated(W: Tensor, curvature: LinearCurvature, kept: Tensor, update: ElementUpdate) -> Removal:
    if update.solver == "conjugate_gradients":
        return update_elements(
            W,
            curvature.terms,
            kept,
            num_iterations=update.num_iterations,
            tolerance=update.tolerance,
            product_dtype=getattr(torch, update.precision),
        )
    after = _updated_directly(W, curvature, kept, update)
    return Removal(after, curvature.quadratic_cost(after - W), 0.0)


def _updated_directly(
    W: Tensor, curvature: LinearCurvature, kept: Tensor, update: ElementUpdate
) -> Tensor:
    if update.solver == "none":
        return W * kept
    if curvature.is_extended:
        inverse = curvature.inverse
        return (W - inverse.solve(W * ~kept / inverse.diagonal())) * kept
    A_inverse = curvature.A.inverse()
    G_inverse = curvature.G.inverse()
    alone = W * ~kept / torch.outer(G_inverse.diagonal(), A_inverse.diagonal())
    return (W - G_inverse @ alone @ A_inverse) * kept
