"""What a plan depends on: the work, and the sizes of the model's parts."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
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
    """What a plan depends on beside model, placement and memory."""

    dtype: str  # of weights and activations
    num_sequences: int  # of the calibration
    sequence_length: int
    factors: Literal["both", "A", "none"]  # which a pass over the calibration text gathers
    gathered: frozenset[str]  # linears whose factors are gathered
    stages: tuple[Stage, ...]  # of the job, in their order
    has_teacher: bool = False  # whether the dense model is beside the pruned one in a step
    # what would let weights be elsewhere, where a step needs them all on the device; "" if none
    # does
    streaming_remedy: str = ""


class ActivationBytes(NamedTuple):
    """Bytes that a block needs for a token.

    Fitted to measurements of Llama-2-7B's blocks in bfloat16 and SmolLM2's in float32.
    """

    kept: float  # from its forward to its backward pass
    moment: float  # more while it runs backward
    forward_only: float  # without gradients
    # of eager attention, by reading transformers' code: for each token that it sees, two kept and
    # four in a moment
    scores: float


class Shapes:
    """Sizes of a model's parts, each computed once.

    Attributes:
        layout: of the model.
        work: what is done.
        width: bytes of a number.
        largest_tensor: bytes of the largest parameter.
        largest_stored: bytes of the largest tensor of a checkpoint, which may hold several.
        linears: of every block.
        block_bytes: of the weights of every block.
        factor_bytes: of the packed factors of every block that are gathered.
        active_parameters: of every block's linears, what a token is multiplied with.
        activations: of every block.
        counts: range of blocks -> what they launch.
        of_shard: range of blocks -> bytes of what a shard of them holds beside them, and what a
            host reserves for its weights, and for its factors.
    """

    def __init__(self, layout: ModelLayout, work: Work, device_type: str = "cpu") -> None:
        """Compute them for workers on a type of device, for which factors are laid out."""
        self.layout = layout
        self.work = work
        self.width = getattr(torch, work.dtype).itemsize
        self._sizes = {name: self.width * math.prod(s) for name, s in layout.parameters.items()}
        self.largest_tensor = max(self._sizes.values())
        stored: dict[str, int] = defaultdict(int)
        self._in_blocks: list[list[int]] = [[] for _ in range(layout.num_blocks)]
        norms: list[list[int]] = [[] for _ in range(layout.num_blocks)]
        for name, size in self._sizes.items():
            stored[layout.family.stored_in(name)] += size
            if (block := layout.block_of(name)) is not None:
                self._in_blocks[block].append(size)
                if len(shape := layout.parameters[name]) == 1 and name.endswith("weight"):
                    norms[block].append(shape[0])
        self.largest_stored = max(stored.values())
        self.linears: list[list[LinearShape]] = [[] for _ in range(layout.num_blocks)]
        for linear in layout.linears:
            self.linears[linear.block].append(linear)
        self.block_bytes = [sum(sizes) for sizes in self._in_blocks]
        self._factors = [_factor_sizes(linears, work, device_type) for linears in self.linears]
        self.factor_bytes = [sum(sizes) for sizes in self._factors]
        part = layout.part_of_tokens
        self.active_parameters = [sum(s.size * part(s) for s in block) for block in self.linears]
        self.activations = [self._activation_bytes(linears) for linears in self.linears]
        of_blocks = zip(self.linears, norms, self.block_bytes, strict=True)
        self._counts = [BlockCounts.of(layout, *of_block) for of_block in of_blocks]
        self.counts = functools.cache(self._counts_of)
        self.of_shard = functools.cache(self._of_shard)

    def _activation_bytes(self, linears: list[LinearShape]) -> ActivationBytes:
        """Count outputs of a block's linears, products of the feed-forward layer, and copies.

        Attention copies its inputs, and norms keep theirs in float32.
        """
        layout = self.layout
        hidden = int(layout.config.hidden_size)
        outputs = sum(linear.num_rows * layout.part_of_tokens(linear) for linear in linears)
        widest = max(linear.num_columns for linear in linears)
        norms = 8 * hidden if self.width < 4 else 0
        return ActivationBytes(
            self.width * (outputs + widest + 4 * hidden) + norms,
            self.width * 4 * widest + 12 * hidden,
            self.width * 3 * widest + 4 * hidden,
            self.width * layout.heads.num_query * (layout.family.runs_attention == "eager"),
        )

    def _counts_of(self, blocks: BlockRange) -> BlockCounts:
        return sum(self._counts[blocks.first : blocks.last], BlockCounts())

    def _of_shard(self, blocks: BlockRange) -> tuple[int, int, int]:
        own = slice(blocks.first, blocks.last)
        names = self.layout.parameters_of(blocks)
        outside = sum(self._sizes[name] for name in names if self.layout.block_of(name) is None)
        weights = reserved_bytes(itertools.chain(*self._in_blocks[own]))
        return outside, weights, reserved_bytes(itertools.chain(*self._factors[own]))


def _factor_sizes(linears: list[LinearShape], work: Work, device_type: str) -> list[int]:
    """Return the bytes of A and G of a block's linears, packed float32."""
    gathered = [s for s in linears if s.name in work.gathered and work.factors != "none"]
    columns = {linear.shared_input: linear.num_columns for linear in gathered}
    rows = [linear.num_rows for linear in gathered]
    return [4 * PackedSymmetric.size(n, device_type) for n in (*columns.values(), *rows)]


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
    batch_bytes: float = 0.0  # of one in a batch, see `together`
    reused_bytes: float = 0.0  # on a CPU, kept while costs are taken, as far as that is allowed
    # beside products
    costs_counts: Counted = NOTHING
    update_counts: Counted = NOTHING
    # of the costs of linears of one shape that go together, and how many these are at most
    batch_counts: Counted = NOTHING
    together: int = 1
