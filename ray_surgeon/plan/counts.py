"""What a GPU does beside products: launches, waits, and bytes that pass its memory.

Numbers of launches were counted on Llama and Qwen3, on tiny models with a dispatch mode; see
benchmarks/launches.py, and tests/plan/test_launches.py, which holds them. Bytes are fits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add

from ray_surgeon.maths.greedy import num_at_once
from ray_surgeon.models.layout import LinearShape, ModelLayout
from ray_surgeon.plan.device_resources import Device

_NORM = (6, 12)
"""Launches of a norm forward and backward, of which 2 are added where it leaves its dtype."""
_REST = (18, 34)
"""Launches of a block beside linears and norms: positions, attention, activation, sums."""
_MIXTURE = (19, 24)
"""Launches of a mixture's layer beside its linears, which go one by one."""
_SYNCS_OF_MIXTURE = 1
"""The host reads once how many tokens every segment has."""
_ENTRIES = (4.5, 12.0)
"""Entries that pass the memory for an input or output of a linear, forward and backward."""
_NORM_BYTES = 36.0
"""More of them for each entry of a norm that leaves its dtype."""
CALL = 25
"""Launches before the first block and behind the last one."""
_SEQUENCE = (6, 13)
"""Launches of a sequence at the head, and more of them if it passes backward."""
SLICE = (30, 19)
"""Launches of a slice of its tokens: beside the dense model's, or with a gradient."""
_LOGIT_BYTES = 40.0
"""Bytes that pass the memory for a logit."""
ADAM_BYTES = 28.0
"""Bytes of a step of Adam for a parameter in float32: four read, three written."""


@dataclass(frozen=True)
class Counted:
    """Counted of a step, or of a part of it, on one worker."""

    launches: float = 0.0  # operators that start a kernel
    syncs: float = 0.0  # for which the host waits
    memory_bytes: float = 0.0  # of the device's own memory that are read and written
    sent_bytes: float = 0.0  # between workers
    calls: float = 0.0  # of a worker, for which it waits
    waiting_s: float = 0.0  # until processes have started, and the like

    def __add__(self, more: Counted) -> Counted:
        return Counted(*map(add, vars(self).values(), vars(more).values()))

    def times(self, number: float) -> Counted:
        """Return the counts of so many such parts."""
        return Counted(*(number * value for value in vars(self).values()))


NOTHING = Counted()


@dataclass(frozen=True)
class StepPlan:
    """One step on one worker."""

    name: str
    device: float  # peak bytes on the device
    host: float  # peak bytes in the host's memory beside it
    flops: float = 0.0  # of the products in the weights' dtype
    float32_flops: float = 0.0
    host_bytes: float = 0.0  # that move between host and device
    disk_bytes: float = 0.0  # that move between disk and host
    bubble: float = 1.0  # how much longer it takes because the shards wait for each other
    counts: Counted = NOTHING

    def seconds(self, device: Device, dtype: str) -> float:
        """Return the expected time.

        A GPU computes while the host launches, so the longer of the two counts; a CPU does both
        itself. Products and what passes the device's memory are taken one after the other: most
        kernels are bound by one of them. Factors do not move while something computes; that
        weights do is not counted on.
        """
        counts = self.counts
        computing = self.flops / device.flops[dtype] + self.float32_flops / device.float32_flops
        computing += counts.memory_bytes / device.memory_bytes_per_s
        launching = counts.launches * device.launch_s
        busy = max(computing, launching) if device.memory_bytes else computing + launching
        moving = self.host_bytes / device.host_bytes_per_s
        moving += self.disk_bytes / device.disk_bytes_per_s
        moving += counts.sent_bytes / device.network_bytes_per_s
        waiting = counts.syncs * device.sync_s + counts.calls * device.call_s
        return self.bubble * (busy + moving + waiting) + counts.waiting_s

    def times(self, number: float) -> StepPlan:
        """Return so many such steps, one after the other."""
        sums = ("flops", "float32_flops", "host_bytes", "disk_bytes")
        more = {name: number * vars(self)[name] for name in sums}
        return replace(self, **more, counts=self.counts.times(number))

    def then(self, later: StepPlan) -> StepPlan:
        """Return both as one step, in which one comes after the other."""
        peaks = ("device", "host", "bubble")
        pairs = {n: (own, vars(later)[n]) for n, own in vars(self).items() if n != "name"}
        both = {n: max(pair) if n in peaks else pair[0] + pair[1] for n, pair in pairs.items()}
        if both["flops"]:  # each part waits its own time
            waits = self.flops * self.bubble + later.flops * later.bubble
            both["bubble"] = waits / both["flops"]
        return StepPlan(self.name, **both)


@dataclass(frozen=True)
class BlockCounts:
    """Counted of blocks: of a call of each, and bytes of a token that passes them."""

    forward: Counted = NOTHING
    backward: Counted = NOTHING
    forward_token: float = 0.0
    backward_token: float = 0.0

    def __add__(self, more: BlockCounts) -> BlockCounts:
        return BlockCounts(*map(add, vars(self).values(), vars(more).values()))

    @staticmethod
    def of(
        layout: ModelLayout, linears: Sequence[LinearShape], norms: Sequence[int], weight_bytes: int
    ) -> BlockCounts:
        """Count a block.

        Args:
            layout: of the model.
            linears: of the block.
            norms: entries of each of its norms.
            weight_bytes: of its weights, which every call reads.
        """
        width = weight_bytes / max(1, sum(linear.size for linear in linears))
        is_narrow = width < 3
        is_mixture = not all(linear.sees_all_tokens for linear in linears)
        forward, backward = (
            len(linears) + len(norms) * (norm + 2 * is_narrow) + rest + mixture * is_mixture
            for norm, rest, mixture in zip(_NORM, _REST, _MIXTURE, strict=True)
        )
        part = layout.part_of_tokens
        entries = sum(part(s) * (s.num_rows + s.num_columns) for s in linears)
        wide = _NORM_BYTES * is_narrow * sum(norms)
        return BlockCounts(
            Counted(forward, _SYNCS_OF_MIXTURE * is_mixture, weight_bytes),
            Counted(backward, 0, weight_bytes),
            *(width * times * entries + wide for times in _ENTRIES),
        )


def head_counts(length: int, slice_length: int, vocabulary: float, *, backward: bool) -> Counted:
    """Return the counts of the loss of a sequence, slice after slice of its tokens."""
    launches = _SEQUENCE[0] + _SEQUENCE[1] * backward
    launches += SLICE[backward] * -(-length // slice_length)
    return Counted(launches, not backward, _LOGIT_BYTES * length * vocabulary)


@functools.cache
def num_steps(num_structures: int, num_removed: float) -> int:
    """Return the steps of a greedy path, which each remove a part of what is left."""
    left = num_structures
    steps = 0
    while num_structures - left < num_removed:
        left -= num_at_once(left, 0)
        steps += 1
    return steps
