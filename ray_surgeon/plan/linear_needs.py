"""What the costs and the update of one linear need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearNeeds:
    """What a method needs for one linear beside its weight and packed factors.

    Bytes are on the device, while it is that linear's turn.
    """

    costs_bytes: float = 0.0
    costs_flops: float = 0.0
    update_bytes: float = 0.0
    update_flops: float = 0.0
    kept_bytes: float = 0.0  # from its costs to its update, all linears at a time
