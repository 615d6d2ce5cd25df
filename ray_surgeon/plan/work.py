"""The inputs of a plan: the work, and the sizes of the model's parts."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.memory.stores import reserved_bytes
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.layout import LinearShape, ModelLayout
from ray_surgeon.plan.counts import NOTHING, BlockCounts, Counted

if TYPE_CHECKING:
    from ray_surgeon.run_state import Stage


@dataclass(frozen=True)
class Work:
    """The inputs of a plan beside model, placement and memory."""

    dtype: str  # of weights and activations
    num_sequences: int  # of the calibration
    sequence_length: int
    factors: Literal["both", "A", "none"]  # gathered by a pass over the calibration text
    gathered: frozenset[str]  # linears whose factors are gathered
    stages: tuple[Stage, ...]  # of the job, in their order
    has_teacher: bool = False  # whether the dense model is beside the pruned one in a step
    # the change that would let weights leave the device, if a step needs all of them there; else ""
    streaming_remedy: str = ""


class ActivationBytes(NamedTuple):
    """Bytes that a block needs for a token.

    Fitted to measurements of Llama-2-7B's blocks in bfloat16 and SmolLM2's in float32.
    """

    kept: float  # from its forward to its backward pass
    moment: float  # in addition while it runs backward
    forward_only: float  # without gradients
    # of eager attention, by reading transformers' code: for each token that it sees, two kept and
    # four in a moment
    scores: float


class Shapes:
    """Sizes of a model's parts, each computed once.

    Attributes:
        layout: of the model.
        work: of the job.
        width: bytes of a number.
        largest_tensor: bytes of the largest parameter.
        largest_stored: bytes of the largest tensor of a checkpoint, which may hold several.
        linears: of every block.
        block_bytes: of the weights of every block.
        factor_bytes: of the gathered packed factors of every block.
        active_parameters: parameters of every block's linears that a token is multiplied with.
        activations: of every block.
        counts: function from a range of blocks to their counts.
        of_shard: function from a range of blocks to the bytes of a shard's weights outside of them,
            and those that a host reserves for the blocks' weights, and for their factors.
    """

    def __init__(self, layout: ModelLayout, work: Work, device_type: str = "cpu") -> None:
        """Compute the sizes.

        Args:
            layout: of the model.
            work: of the job.
            device_type: of the workers, which determines how factors are laid out.
        """
        self.layout = layout
        self.work = work
        self.width = getattr(torch, work.dtype).itemsize
        self._sizes: dict[str, int] = {}
        for name, shape in layout.parameters.items():
            self._sizes[name] = self.width * math.prod(shape)
        self.largest_tensor = max(self._sizes.values())
        self.largest_stored = self._largest_stored()
        self.linears: list[list[LinearShape]] = [[] for _ in range(layout.num_blocks)]
        for linear in layout.linears:
            self.linears[linear.block].append(linear)
        self._in_blocks = self._sizes_in_blocks()
        self.block_bytes = [sum(sizes) for sizes in self._in_blocks]
        self._factors = [_factor_sizes(linears, work, device_type) for linears in self.linears]
        self.factor_bytes = [sum(sizes) for sizes in self._factors]
        self.active_parameters = [self._active_parameters(linears) for linears in self.linears]
        self.activations = [self._activation_bytes(linears) for linears in self.linears]
        self._counts = self._count_blocks()
        self.counts = functools.cache(self._counts_of)
        self.of_shard = functools.cache(self._of_shard)

    def _largest_stored(self) -> int:
        stored: dict[str, int] = defaultdict(int)
        for name, size in self._sizes.items():
            stored[self.layout.family.stored_in(name)] += size
        return max(stored.values())

    def _sizes_in_blocks(self) -> list[list[int]]:
        """Return the bytes of every parameter of each block."""
        sizes: list[list[int]] = [[] for _ in range(self.layout.num_blocks)]
        for name, size in self._sizes.items():
            block = self.layout.block_of(name)
            if block is not None:
                sizes[block].append(size)
        return sizes

    def _active_parameters(self, linears: Sequence[LinearShape]) -> float:
        return sum(linear.size * self.layout.part_of_tokens(linear) for linear in linears)

    def _activation_bytes(self, linears: list[LinearShape]) -> ActivationBytes:
        """Count outputs of a block's linears, products of the feed-forward layer, and copies.

        Attention copies its inputs, and norms keep theirs in float32.
        """
        layout = self.layout
        hidden = int(layout.config.hidden_size)
        outputs = sum(linear.num_rows * layout.part_of_tokens(linear) for linear in linears)
        widest = max(linear.num_columns for linear in linears)
        norms = 8 * hidden if self.width < 4 else 0
        has_scores = layout.family.runs_attention == "eager"
        return ActivationBytes(
            kept=self.width * (outputs + widest + 4 * hidden) + norms,
            moment=self.width * 4 * widest + 12 * hidden,
            forward_only=self.width * 3 * widest + 4 * hidden,
            scores=self.width * layout.heads.num_query if has_scores else 0,
        )

    def _count_blocks(self) -> list[BlockCounts]:
        """Return the counts of every block."""
        layout = self.layout
        norms: list[list[int]] = [[] for _ in range(layout.num_blocks)]
        for name, shape in layout.parameters.items():
            block = layout.block_of(name)
            if block is not None and len(shape) == 1 and name.endswith("weight"):
                norms[block].append(shape[0])
        counts = []
        for block in range(layout.num_blocks):
            of_block = BlockCounts.of(
                layout,
                linears=self.linears[block],
                norms=norms[block],
                weight_bytes=self.block_bytes[block],
            )
            counts.append(of_block)
        return counts

    def _counts_of(self, blocks: BlockRange) -> BlockCounts:
        return sum(self._counts[blocks.first : blocks.last], BlockCounts())

    def _of_shard(self, blocks: BlockRange) -> tuple[int, int, int]:
        own = slice(blocks.first, blocks.last)
        outside = 0
        for name in self.layout.parameters_of(blocks):
            if self.layout.block_of(name) is None:
                outside += self._sizes[name]
        weights = reserved_bytes(itertools.chain(*self._in_blocks[own]))
        factors = reserved_bytes(itertools.chain(*self._factors[own]))
        return outside, weights, factors


def _factor_sizes(linears: list[LinearShape], work: Work, device_type: str) -> list[int]:
    """Return the bytes of A and G of a block's linears, packed in float32."""
    if work.factors == "none":
        return []
    columns: dict[int, int] = {}  # shared input -> size of A
    rows = []
    for linear in linears:
        if linear.name in work.gathered:
            columns[linear.shared_input] = linear.num_columns
            rows.append(linear.num_rows)
    orders = [*columns.values(), *rows]
    return [4 * PackedSymmetric.size(order, device_type) for order in orders]


@dataclass(frozen=True)
class LinearNeeds:
    """Needs of a method for one linear beside its weight and packed factors.

    Bytes are on the device, while that linear is treated.
    """

    costs_bytes: float = 0.0
    costs_flops: float = 0.0
    update_bytes: float = 0.0
    update_flops: float = 0.0
    kept_bytes: float = 0.0  # from its costs to its update, of all linears at the same time
    batch_bytes: float = 0.0  # of one linear in a batch, see `together`
    reused_bytes: float = 0.0  # on a CPU, kept while costs are computed, up to a limit
    # beside products
    costs_counts: Counted = NOTHING
    update_counts: Counted = NOTHING
    # of the costs of a batch of linears of one shape, and the largest number of them in a batch
    batch_counts: Counted = NOTHING
    together: int = 1
