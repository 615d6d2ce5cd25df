"""Who holds which blocks and who owns which linears: pure functions of shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.layout import LinearShape, ModelLayout


@dataclass(frozen=True, order=True)
class WorkerIndex:
    """Which worker: the shard it holds and the replica it belongs to, e.g. (shard=1, replica=0)."""

    shard: int
    replica: int


@dataclass(frozen=True)
class Placement:
    """Blocks of every shard, and the replica that owns each shared-input group."""

    num_replicas: int  # copies of every shard
    blocks: tuple[BlockRange, ...]  # one range a shard, e.g. (0, 17), (17, 30)
    # shared-input group -> replica that reduces, inverts, costs and updates its linears
    owners: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.blocks)

    @property
    def workers(self) -> list[WorkerIndex]:
        """Every worker, replica by replica."""
        places = product(range(self.num_replicas), range(self.num_shards))
        return [WorkerIndex(shard, replica) for replica, shard in places]


def head_cost_in_blocks(layout: ModelLayout) -> float:
    """Return what the head costs in a curvature pass, in blocks.

    A linear costs 2 x 2 R C (forward, backward to its input) and R^2 + C^2 (its factors, half of
    them by symmetry) a token.
    """
    inputs = {s.shared_input: s.num_columns for s in layout.linears}
    block = sum(4 * s.num_rows * s.num_columns + s.num_rows**2 for s in layout.linears)
    block += sum(c**2 for c in inputs.values())
    head: int = layout.config.vocab_size * layout.config.hidden_size
    return 4 * head * layout.num_blocks / block


def partition_blocks(num_blocks: int, num_shards: int, head_cost: float) -> tuple[BlockRange, ...]:
    """Cut the blocks into contiguous shards so that the slowest is as fast as can be.

    The last shard has the head, too.

    Args:
        num_blocks: decoder blocks.
        num_shards: at most `num_blocks`.
        head_cost: see `head_cost_in_blocks`.

    Raises:
        ValueError: there are more shards than blocks.
    """
    if not 1 <= num_shards <= num_blocks:
        problem = f"{num_shards} shards cannot be filled, the model has {num_blocks} blocks"
        remedy = f"give 1 to {num_blocks}, and use cluster.num_replicas for more workers"
        raise ValueError(f"cluster.num_shards: {problem}; {remedy}")
    if num_shards == 1:
        return (BlockRange(0, num_blocks, num_blocks),)
    others = num_shards - 1

    def slowest(last: int) -> float:
        return max(-(-(num_blocks - last) // others), last + head_cost)

    last = min(range(1, num_blocks - others + 1), key=slowest)
    rest = num_blocks - last
    parts = [*np.array_split(np.arange(rest), others), np.arange(rest, num_blocks)]
    return tuple(BlockRange(int(part[0]), int(part[-1]) + 1, num_blocks) for part in parts)


def assign_owners(
    shapes: Sequence[LinearShape], num_replicas: int, blocks: Sequence[BlockRange]
) -> tuple[int, ...]:
    """Give every shared-input group an owner among the replicas of its shard.

    The largest group goes first, to the replica with the least work.

    Linears that see a part of the tokens have one owner in a block, because each is estimated with
    the help of the others.
    The work of a linear is R^3 + C^3, for the two factorisations.
    """
    # block -> its first group that sees a part of the tokens, which stands for all of them
    first_of_mixture: dict[int, int] = {}
    stands_for: dict[int, int] = {}
    work = Counter[tuple[int, int]]()  # (block, group) -> of the linears that it stands for
    for s in shapes:
        group = s.shared_input
        if not s.sees_all_tokens:
            group = first_of_mixture.setdefault(s.block, group)
        stands_for[s.shared_input] = group
        work[s.block, group] += s.num_rows**3 + s.num_columns**3
    owner_of: dict[int, int] = {}
    for shard in blocks:
        load = [0] * num_replicas
        own = (key for key in work if key[0] in shard)
        for block, group in sorted(own, key=lambda key: (-work[key], key[1])):
            owner_of[group] = load.index(min(load))
            load[owner_of[group]] += work[block, group]
    return tuple(owner_of[stands_for[group]] for group in range(len(stands_for)))


def place(layout: ModelLayout, num_shards: int, num_replicas: int) -> Placement:
    """Return the placement of a model on ``num_shards x num_replicas`` workers.

    Raises:
        ValueError: see `partition_blocks`.
    """
    blocks = partition_blocks(layout.num_blocks, num_shards, head_cost_in_blocks(layout))
    return Placement(num_replicas, blocks, assign_owners(layout.linears, num_replicas, blocks))
