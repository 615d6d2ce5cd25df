"""What the activations of a block take in memory, for the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_surgeon.models.layout import LinearShape


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that a block needs for a token.

    Fitted to measurements of Llama-2-7B's blocks in bfloat16 and SmolLM2's in float32.
    """

    kept: float  # from its forward to its backward pass
    moment: float  # more while it runs backward
    forward_only: float  # without gradients
    # of eager attention, by reading transformers' code: for each token that it sees, two kept and
    # four in a moment
    scores: float

    @staticmethod
    def of(
        linears: Sequence[LinearShape],
        width: int,
        hidden: int,
        *,
        share_active: float,
        eager_heads: int,
    ) -> ActivationBytes:
        """Count outputs of linears, products of the feed-forward layer, and copies.

        Attention copies its inputs, and norms keep theirs in float32.

        Args:
            linears: of the block.
            width: bytes of a number.
            hidden: size of a hidden state.
            share_active: of an expert's tokens, of all.
            eager_heads: whose scores are made whole; 0 if none are.
        """
        outputs = sum(
            linear.num_rows * (1.0 if linear.expert is None else share_active) for linear in linears
        )
        widest = max(linear.num_columns for linear in linears)
        norms = 8 * hidden if width < 4 else 0
        kept = width * (outputs + widest + 4 * hidden) + norms
        moment = width * 4 * widest + 12 * hidden
        forward_only = width * 3 * widest + 4 * hidden
        return ActivationBytes(kept, moment, forward_only, width * eager_heads)
