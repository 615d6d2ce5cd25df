"""Assigns blocks to workers and linears to owners, by pure functions of shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.layout import LinearShape, ModelLayout


@dataclass(frozen=True, order=True)
class WorkerIndex:
    """The shard that a worker holds and its replica, e.g. (shard=1, replica=0)."""

    shard: int
    replica: int


@dataclass(frozen=True)
class Placement:
    """Blocks of every shard, and the replica that owns each shared-input group."""

    num_replicas: int  # copies of every shard
    blocks: tuple[BlockRange, ...]  # one range per shard, e.g. (0, 17), (17, 30)
    # shared-input group -> replica that reduces, inverts, costs and updates its linears
    owners: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.blocks)

    @property
    def workers(self) -> list[WorkerIndex]:
        """Every worker, replica by replica."""
        indices: list[WorkerIndex] = []
        for replica in range(self.num_replicas):
            for shard in range(self.num_shards):
                indices.append(WorkerIndex(shard, replica))
        return indices


def head_cost_in_blocks(layout: ModelLayout) -> float:
    """Return the cost of the head in a curvature pass, as a multiple of that of a block.

    A linear costs 2 x 2 R C operations per token for the forward pass and the backward pass to its
    input, and R^2 + C^2 for its factors, which are symmetric.
    """
    num_columns_of: dict[int, int] = {}  # shared input -> its columns
    blocks_cost = 0
    for linear in layout.linears:
        num_columns_of[linear.shared_input] = linear.num_columns
        blocks_cost += 4 * linear.num_rows * linear.num_columns + linear.num_rows**2
    for num_columns in num_columns_of.values():
        blocks_cost += num_columns**2
    head_size: int = layout.config.vocab_size * layout.config.hidden_size
    return 4 * head_size * layout.num_blocks / blocks_cost


def partition_blocks(
    num_blocks: int,
    num_shards: int,
    head_cost: float,
) -> tuple[BlockRange, ...]:
    """Cut the blocks into contiguous shards so that the slowest shard is as fast as possible.

    The last shard also has the head.

    Args:
        num_blocks: number of decoder blocks.
        num_shards: number of shards, at most `num_blocks`.
        head_cost: see `head_cost_in_blocks`.

    Raises:
        ValueError: there are more shards than blocks.
    """
    if not 1 <= num_shards <= num_blocks:
        raise ConfigError(
            field="cluster.num_shards",
            found=f"{num_shards} shards cannot be filled, the model has {num_blocks} blocks",
            remedy=f"give 1 to {num_blocks}, and use cluster.num_replicas for more workers",
        )
    if num_shards == 1:
        return (BlockRange(0, num_blocks, num_blocks),)
    num_others = num_shards - 1

    def slowest(num_last: int) -> float:
        largest_other = -(-(num_blocks - num_last) // num_others)
        return max(largest_other, num_last + head_cost)

    num_last = min(range(1, num_blocks - num_others + 1), key=slowest)
    start_of_last = num_blocks - num_last
    shards: list[BlockRange] = []
    for part in np.array_split(np.arange(start_of_last), num_others):
        shards.append(BlockRange(int(part[0]), int(part[-1]) + 1, num_blocks))
    shards.append(BlockRange(start_of_last, num_blocks, num_blocks))
    return tuple(shards)


def assign_owners(
    shapes: Sequence[LinearShape], num_replicas: int, blocks: Sequence[BlockRange]
) -> tuple[int, ...]:
    """Return the owner of every shared-input group, a replica of the group's shard.

    The largest group goes first, to the replica with the least work. The work of a linear is
    R^3 + C^3, for the two factorisations.

    Linears of a block that see only part of the tokens have the same owner, because each is
    estimated with the help of the others.
    """
    # block -> its first group that sees part of the tokens, which stands for all such groups
    first_of_mixture: dict[int, int] = {}
    stands_for: dict[int, int] = {}
    work = Counter[
        tuple[int, int]
    ]()  # (block, group) -> work of the linears it stands for
    for linear in shapes:
        group = linear.shared_input
        if not linear.sees_all_tokens:
            group = first_of_mixture.setdefault(linear.block, group)
        stands_for[linear.shared_input] = group
        work[linear.block, group] += linear.num_rows**3 + linear.num_columns**3
    owner_of: dict[int, int] = {}
    for shard in blocks:
        load = [0] * num_replicas
        keys = [key for key in work if key[0] in shard]
        keys.sort(key=lambda key: (-work[key], key[1]))
        for key in keys:
            owner = load.index(min(load))
            load[owner] += work[key]
            owner_of[key[1]] = owner
    return tuple(owner_of[stands_for[group]] for group in range(len(stands_for)))


def place(layout: ModelLayout, num_shards: int, num_replicas: int) -> Placement:
    """Return the placement of a model on ``num_shards x num_replicas`` workers.

    Raises:
        ValueError: see `partition_blocks`.
    """
    blocks = partition_blocks(layout.num_blocks, num_shards, head_cost_in_blocks(layout))
    return Placement(
        num_replicas=num_replicas,
        blocks=blocks,
        owners=assign_owners(layout.linears, num_replicas, blocks),
    )
