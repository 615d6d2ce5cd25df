"""What costs and update of the consumer of coupled groups need, for the plan.

Launches and syncs were counted; see tests/plan/test_launches.py.
"""

from __future__ import annotations

from ray_surgeon.maths.group_batch import bytes_needed, most_at_once
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.counts import Counted, num_steps
from ray_surgeon.plan.work import LinearNeeds

FARTHER = 1.25
"""Times as many groups as go are on the paths that are followed."""
_HEAD = 128
"""Columns of a group of attention."""
_STEP = 25
"""Launches of a step of a batch's paths, for which the host waits once."""
_STEP_ALONE = (108, 11)
"""Launches and syncs of a step of a consumer that is too large for a batch."""
_BATCH = 610
_SYNCS_OF_BATCH = 51
"""Launches and syncs of a batch beside the steps."""
_COSTS = 22
"""More launches for each consumer in it."""
_UPDATE = ((105, 22), (120, 29))
"""Launches and syncs of a consumer's update: of one in a mixture, and of all others."""


def needs_of_consumer(shape: LinearShape, reach: float, share: float) -> LinearNeeds:
    """Return what a consumer needs: its A is factorised, then the part of it that stays.

    Args:
        shape: of the consumer.
        reach: part of its columns of which copies may exist beside it.
        share: part of its groups that the paths are followed for.
    """
    R = shape.num_rows
    C = shape.num_columns
    # the mean of the layer and the shrunk factors, packed
    shrinking = 0 if shape.sees_all_tokens else 4 * (R**2 + C**2)
    num_groups = C // _HEAD if "att" in shape.role else C
    steps = num_steps(num_groups, min(1.0, share) * num_groups)
    # the first where nearly all stays
    measured = max(3.75 * C**2 + 2 * R * C, 2.2 * C**2 + 5 * R * C)
    together = most_at_once(R, C)
    step, syncs = (_STEP, 1) if together else _STEP_ALONE
    return LinearNeeds(
        costs_bytes=shrinking + 4 * ((2.6 + reach) * C**2 + 2 * R**2 + 4.2 * R * C),
        costs_flops=5.0 * C**3 + R**3 + 4 * R**2 * C,
        update_bytes=shrinking + 4 * (measured + R**2),
        update_flops=2.0 * C**3,
        costs_counts=Counted(_COSTS, 0, 4.0 * (2 * C**2 + 6 * R * C) * steps),
        update_counts=Counted(*_UPDATE[shape.sees_all_tokens], 4.0 * (4 * C**2 + 6 * R * C)),
        batch_counts=Counted(_BATCH + step * steps, _SYNCS_OF_BATCH + syncs * steps),
        together=max(1, together),
        batch_bytes=bytes_needed(R, C) * (together > 0),
        reused_bytes=4.0 * C**2,
    )
