"""Costs of a step beside its products: launches, waits, and traffic of the device's memory.

Numbers of launches were counted on Llama and Qwen3, on tiny models with a dispatch mode; see
benchmarks/launches.py, and tests/plan/test_launches.py, which checks them. Bytes are fits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ray_surgeon.maths.greedy import num_at_once
from ray_surgeon.models.layout import LinearShape, ModelLayout
from ray_surgeon.plan.device_resources import Device


class _Passes(NamedTuple):
    """A figure of a forward pass, and the same figure of a backward pass."""

    forward: float
    backward: float


_NORM = _Passes(6, 12)
"""Launches of a norm."""
_NORM_CONVERSIONS = 2
"""Further launches of a norm that computes in float32 on weights of another dtype, each way."""
_REST = _Passes(18, 34)
"""Launches of a block beside linears and norms: positions, attention, activation, sums."""
_MIXTURE = _Passes(19, 24)
"""Launches of a mixture's layer beside its linears, which run one by one."""
_SYNCS_OF_MIXTURE = 1
"""The host reads once how many tokens every segment has."""
_ENTRIES = _Passes(4.5, 12.0)
"""Entries read or written for each entry of an input or output of a linear."""
_NORM_BYTES = 36.0
"""Bytes in addition for each entry of a norm that computes in float32 on another dtype."""
CALL = 25
"""Launches before the first block and after the last one."""
_SEQUENCE = 6
"""Launches of a sequence at the head."""
_SEQUENCE_BACKWARD = 13
"""Launches in addition if the sequence passes backward."""
SLICE = 30
"""Launches of a slice of tokens at the head, with the dense model's logits and no gradient."""
_SLICE_BACKWARD = 19
"""Launches of a slice of tokens at the head with a gradient."""
_LOGIT_BYTES = 40.0
"""Bytes read or written for a logit."""
ADAM_BYTES = 28.0
"""Bytes of a step of Adam for a parameter in float32: four read, three written."""


@dataclass(frozen=True)
class Counted:
    """Counts of a step, or of a part of it, on one worker."""

    launches: float = 0.0  # operators that start a kernel
    syncs: float = 0.0  # operators for whose results the host waits
    memory_bytes: float = 0.0  # read or written in the device's own memory
    sent_bytes: float = 0.0  # between workers
    calls: float = 0.0  # of the worker, each of which it waits for
    waiting_s: float = 0.0  # for instance until processes have started

    def __add__(self, more: Counted) -> Counted:
        return Counted(
            launches=self.launches + more.launches,
            syncs=self.syncs + more.syncs,
            memory_bytes=self.memory_bytes + more.memory_bytes,
            sent_bytes=self.sent_bytes + more.sent_bytes,
            calls=self.calls + more.calls,
            waiting_s=self.waiting_s + more.waiting_s,
        )

    def times(self, number: float) -> Counted:
        """Return the counts of that number of such parts."""
        return Counted(
            launches=number * self.launches,
            syncs=number * self.syncs,
            memory_bytes=number * self.memory_bytes,
            sent_bytes=number * self.sent_bytes,
            calls=number * self.calls,
            waiting_s=number * self.waiting_s,
        )


NOTHING = Counted()


@dataclass(frozen=True)
class StepPlan:
    """One step on one worker."""

    name: str
    device: float  # peak bytes on the device
    host: float  # peak bytes in the host's memory beside it
    flops: float = 0.0  # of the products in the weights' dtype
    float32_flops: float = 0.0
    host_bytes: float = 0.0  # moved between host and device
    disk_bytes: float = 0.0  # moved between disk and host
    bubble: float = 1.0  # factor on the time because the shards wait for each other
    counts: Counted = NOTHING

    def seconds(self, device: Device, dtype: str) -> float:
        """Return the expected time.

        A GPU computes while the host launches, so the longer of the two counts; a CPU does both
        itself. The times of products and of the device's memory are added, because most kernels are
        bound by one of them. So are those of moves: factors do not move while something computes,
        and an overlap of moving weights with computation is not counted on.
        """
        counts = self.counts
        computing = self.flops / device.flops[dtype] + self.float32_flops / device.float32_flops
        computing += counts.memory_bytes / device.memory_bytes_per_s
        launching = counts.launches * device.launch_s
        is_gpu = bool(device.memory_bytes)
        busy = max(computing, launching) if is_gpu else computing + launching
        moving = self.host_bytes / device.host_bytes_per_s
        moving += self.disk_bytes / device.disk_bytes_per_s
        moving += counts.sent_bytes / device.network_bytes_per_s
        waiting = counts.syncs * device.sync_s + counts.calls * device.call_s
        return self.bubble * (busy + moving + waiting) + counts.waiting_s

    def times(self, number: float) -> StepPlan:
        """Return that number of such steps, one after the other, as one step."""
        return replace(
            self,
            flops=number * self.flops,
            float32_flops=number * self.float32_flops,
            host_bytes=number * self.host_bytes,
            disk_bytes=number * self.disk_bytes,
            counts=self.counts.times(number),
        )

    def then(self, later: StepPlan) -> StepPlan:
        """Return this step and a later one as one step with this one's name."""
        flops = self.flops + later.flops
        if flops:  # each part waits its own time
            bubble = (self.flops * self.bubble + later.flops * later.bubble) / flops
        else:
            bubble = max(self.bubble, later.bubble)
        return StepPlan(
            name=self.name,
            device=max(self.device, later.device),
            host=max(self.host, later.host),
            flops=flops,
            float32_flops=self.float32_flops + later.float32_flops,
            host_bytes=self.host_bytes + later.host_bytes,
            disk_bytes=self.disk_bytes + later.disk_bytes,
            bubble=bubble,
            counts=self.counts + later.counts,
        )


@dataclass(frozen=True)
class BlockCounts:
    """Counts of a call of each of some blocks, and bytes for every token that passes them."""

    forward: Counted = NOTHING
    backward: Counted = NOTHING
    forward_token: float = 0.0
    backward_token: float = 0.0

    def __add__(self, more: BlockCounts) -> BlockCounts:
        return BlockCounts(
            forward=self.forward + more.forward,
            backward=self.backward + more.backward,
            forward_token=self.forward_token + more.forward_token,
            backward_token=self.backward_token + more.backward_token,
        )

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
        norms_convert = width < 3
        num_conversions = 0
        norm_bytes = 0.0
        if norms_convert:
            num_conversions = _NORM_CONVERSIONS * len(norms)
            norm_bytes = _NORM_BYTES * sum(norms)
        forward = len(linears) + len(norms) * _NORM.forward + num_conversions + _REST.forward
        backward = len(linears) + len(norms) * _NORM.backward + num_conversions + _REST.backward
        syncs = 0
        if not all(linear.sees_all_tokens for linear in linears):
            forward += _MIXTURE.forward
            backward += _MIXTURE.backward
            syncs = _SYNCS_OF_MIXTURE
        entries = sum(
            layout.part_of_tokens(linear) * (linear.num_rows + linear.num_columns)
            for linear in linears
        )
        return BlockCounts(
            forward=Counted(launches=forward, syncs=syncs, memory_bytes=weight_bytes),
            backward=Counted(launches=backward, memory_bytes=weight_bytes),
            forward_token=width * _ENTRIES.forward * entries + norm_bytes,
            backward_token=width * _ENTRIES.backward * entries + norm_bytes,
        )


def head_counts(length: int, slice_length: int, vocabulary: float, *, backward: bool) -> Counted:
    """Return the counts of the loss of a sequence, which is computed slice by slice.

    Args:
        length: tokens of the sequence.
        slice_length: tokens of a slice.
        vocabulary: logits of a token.
        backward: whether the loss has a gradient.
    """
    num_slices = -(-length // slice_length)
    if backward:
        launches = _SEQUENCE + _SEQUENCE_BACKWARD + _SLICE_BACKWARD * num_slices
        syncs = 0
    else:
        launches = _SEQUENCE + SLICE * num_slices
        syncs = 1
    memory_bytes = _LOGIT_BYTES * length * vocabulary
    return Counted(launches=launches, syncs=syncs, memory_bytes=memory_bytes)


@functools.cache
def num_steps(num_structures: int, num_removed: float) -> int:
    """Return the steps of a greedy path, each of which removes a part of the rest."""
    left = num_structures
    steps = 0
    while num_structures - left < num_removed:
        left -= num_at_once(left, 0)
        steps += 1
    return steps
