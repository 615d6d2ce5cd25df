"""What the steps of a job need on a worker, by arithmetic on shapes.

That is memory, operations, and bytes that move. Stages say what they need in terms of a
`WorkerView`; the plan sums it up.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.memory.pinned import reserved_bytes
from ray_surgeon.memory.stores import Place, Stores
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import part_of_stack
from ray_surgeon.models.layout import LinearShape, ModelLayout
from ray_surgeon.models.loss import bytes_at_the_head
from ray_surgeon.models.runner import TOKENS_OF_ROOM
from ray_surgeon.plan.activations import ActivationBytes
from ray_surgeon.plan.devices import Device
from ray_surgeon.runtime.placement import Placement
from ray_surgeon.runtime.sampling import num_batches

PROCESS_BYTES = (328 + 60) * 2**20
"""Anonymous memory of a worker beside its tensors.

The first part is there once it has imported everything; the second is what the C library's heap and
oneDNN hold more once it has computed. Measured with torch 2.13 and Ray 2.60 on Linux.
"""


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

    def seconds(self, device: Device, dtype: str) -> float:
        """Return the expected time.

        Factors do not move while something computes; that weights do is not counted on.
        """
        computing = self.flops / device.flops[dtype] + self.float32_flops / device.float32_flops
        moving = (
            self.host_bytes / device.host_bytes_per_s + self.disk_bytes / device.disk_bytes_per_s
        )
        return self.bubble * (computing + moving)

    def then(self, other: StepPlan) -> StepPlan:
        """Return both as one step, in which one comes after the other."""
        return StepPlan(
            self.name,
            max(self.device, other.device),
            max(self.host, other.host),
            self.flops + other.flops,
            self.float32_flops + other.float32_flops,
            self.host_bytes + other.host_bytes,
            self.disk_bytes + other.disk_bytes,
            max(self.bubble, other.bubble),
        )


@dataclass(frozen=True)
class Beside:
    """Bytes that a stage needs in the steps of others."""

    device: float = 0.0
    host: float = 0.0


class Planned(Protocol):
    """A stage, as the plan sees it."""

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Yield the steps of a shot, or before and after all shots, with what they need."""

    def beside(self, worker: WorkerView) -> Mapping[str, Beside]:
        """Return step -> what this stage needs in the steps of others of that name."""

    def on_host(self, worker: WorkerView) -> float:
        """Return the bytes of the host's memory that this stage needs in all steps."""


@dataclass(frozen=True)
class Work:
    """What a plan depends on beside model, placement and memory."""

    dtype: str  # of weights and activations
    num_sequences: int  # of the calibration
    sequence_length: int
    factors: Literal["both", "A", "none"]  # which a pass over the calibration text gathers
    gathered: frozenset[str]  # linears whose factors are gathered
    stages: tuple[Planned, ...]  # of the job, in their order


class Shapes:
    """Sizes of a model's parts, each computed once."""

    def __init__(self, layout: ModelLayout, work: Work) -> None:
        self.layout = layout
        self.width = getattr(torch, work.dtype).itemsize
        self.block_bytes = [0] * layout.num_blocks
        self._sizes: list[list[int]] = [[] for _ in range(layout.num_blocks)]
        stored: dict[str, int] = defaultdict(int)
        self.largest_tensor = 0
        for name, shape in layout.parameters.items():
            size = self.width * math.prod(shape)
            self.largest_tensor = max(self.largest_tensor, size)
            part = part_of_stack(layout.family, name)
            stored[name if part is None else part.whole] += size
            if (block := layout.block_of(name)) is not None:
                self.block_bytes[block] += size
                self._sizes[block].append(size)
        self.largest_stored = max(stored.values())  # tensor of a checkpoint
        self.linears: list[list[LinearShape]] = [[] for _ in range(layout.num_blocks)]
        for linear in layout.linears:
            self.linears[linear.block].append(linear)
        # of an expert's tokens, of all
        self.share_active = layout.num_active_experts / max(1, layout.num_experts)
        self.active_parameters = [  # of every block's linears, what a token is multiplied with
            sum(
                linear.size * (1.0 if linear.expert is None else self.share_active)
                for linear in linears
            )
            for linears in self.linears
        ]
        self._factor_sizes = [self._factors(block, work) for block in range(layout.num_blocks)]
        self.factor_bytes = [sum(sizes) for sizes in self._factor_sizes]
        self.pinned_bytes = functools.cache(self._pinned_bytes)
        self._outside: dict[tuple[bool, bool], int] = {}

    def _factors(self, block: int, work: Work) -> list[int]:
        if work.factors == "none":
            return []
        gathered = [linear for linear in self.linears[block] if linear.name in work.gathered]
        num_columns = {linear.shared_input: linear.num_columns for linear in gathered}
        return [
            4 * PackedSymmetric.size(n)
            for n in (*num_columns.values(), *(linear.num_rows for linear in gathered))
        ]

    def _pinned_bytes(self, blocks: BlockRange) -> tuple[int, int]:
        """Return what the host reserves for weights of blocks and for their factors.

        This is so where they go to a GPU.
        """
        own = slice(blocks.first, blocks.last)
        weights, factors = (
            reserved_bytes(itertools.chain(*sizes[own]))
            for sizes in (self._sizes, self._factor_sizes)
        )
        return weights, factors

    def outside_bytes(self, blocks: BlockRange) -> int:
        """Return the bytes of what a shard holds outside of its blocks.

        They depend on whether it has the first block and the last.
        """
        ends = blocks.is_first, blocks.is_last
        if ends not in self._outside:
            whole = (
                sum(math.prod(shape) for shape in self.layout.parameters_of(blocks).values())
                * self.width
            )
            self._outside[ends] = int(whole) - sum(self.block_bytes[blocks.first : blocks.last])
        return self._outside[ends]


class WorkerView:
    """One worker, in whose terms a stage says what it needs.

    Attributes:
        shapes: sizes of the model.
        stores: where idle weights and factors are kept.
        linears: of the worker's blocks.
        num_blocks: of the worker.
        gathered: those of the linears whose factors are gathered.
        owners: linear -> replica that owns it.
        num_shards: of the model.
        num_replicas: of each shard.
        num_sequences: of the calibration.
        sequence_length: of the calibration.
        sequences: of the calibration that the replica with most of them has.
        wave: sequences that pass together.
        device_is_host: whether device and host have one memory.
        weights: bytes on the device while blocks run.
        idle: bytes on the device of weights that stay there.
        all_blocks: bytes of the weights of all blocks.
        all_factors: bytes of all packed factors.
        largest_factors: bytes of those of a block, at most.
        outside: bytes of what lies outside of the blocks.
        active: parameters of the linears that a token is multiplied with.
        hidden_size: numbers in a hidden state.
        head_flops: operations of the head for a token, forward.
        host: bytes of the host's memory in every step.
    """

    def __init__(
        self,
        shapes: Shapes,
        placement: Placement,
        work: Work,
        stores: Stores,
        device_is_host: bool,
        shard: int,
        blocks: BlockRange,
    ) -> None:
        """Take one worker of a shard, the one with most to do."""
        self.shapes = shapes
        self.stores = stores
        self._work = work
        self._blocks = blocks
        self._own = range(blocks.first, blocks.last)
        self.num_blocks = len(self._own)
        self.num_shards = placement.num_shards
        self.num_replicas = placement.num_replicas
        self.device_is_host = device_is_host
        self.linears = [linear for block in self._own for linear in shapes.linears[block]]
        self.gathered = [linear for linear in self.linears if linear.name in work.gathered]
        self.owners = {
            linear.name: placement.owners[linear.shared_input] for linear in self.linears
        }
        config = shapes.layout.config
        self.hidden_size = int(config.hidden_size)
        self._hidden = self.hidden_size * shapes.width
        self._set_weights()
        self._set_sequences(shard)
        self._set_activations()
        self.head_flops = 0
        self._head = 0
        if blocks.is_last:
            self.head_flops = 2 * config.vocab_size * config.hidden_size
            self._head = bytes_at_the_head(config.vocab_size, shapes.width, on_cpu=device_is_host)
        self.host = 0.0
        self.host = self._host_of_stores() + sum(stage.on_host(self) for stage in work.stages)

    def _set_weights(self) -> None:
        sizes = [self.shapes.block_bytes[block] for block in self._own]
        self.all_blocks = sum(sizes)
        self.outside = self.shapes.outside_bytes(self._blocks)
        self.active = sum(self.shapes.active_parameters[block] for block in self._own)
        factors = [self.shapes.factor_bytes[block] for block in self._own]
        self.all_factors = sum(factors)
        self.largest_factors = max(factors)
        is_resident = self.stores.weights == "device"
        resident = self.all_blocks if is_resident else 0
        # on the CPU a block runs where it lies, elsewhere the next one is ahead
        copies = 0 if self.device_is_host or is_resident else 2 * max(sizes)
        self.idle = self.outside + resident
        self.weights = self.outside + resident + copies

    def _set_sequences(self, shard: int) -> None:
        self.num_sequences = self._work.num_sequences
        self.sequence_length = self._work.sequence_length
        self.sequences = -(-self.num_sequences // self.num_replicas)
        self.wave = min(self.stores.wave, self.sequences)
        self.num_waves = -(-self.sequences // self.wave)
        self._in_flight = min(self.num_waves, self.num_shards - shard)

    def _set_activations(self) -> None:
        layout = self.shapes.layout
        is_eager = layout.family.runs_attention == "eager"
        sides = [
            ActivationBytes.of(
                self.shapes.linears[block],
                self.shapes.width,
                self.hidden_size,
                share_active=self.shapes.share_active,
                eager_heads=layout.heads.num_query * is_eager,
            )
            for block in self._own
        ]
        self._scores = sides[0].scores
        self._kept = max(side.kept for side in sides)
        self._moment = max(side.moment for side in sides)
        self._forward_only = max(side.forward_only for side in sides)

    def _host_of_stores(self) -> float:
        """Return the host's bytes of weights, and of pinned pieces, which torch keeps."""
        stores = self.stores
        if self.device_is_host:
            return self.all_blocks if stores.weights == "host" else 0.0
        weights, factors = self.shapes.pinned_bytes(self._blocks)
        return weights * (stores.weights == "host") + factors * (stores.factors == "host")

    @property
    def disk_bytes(self) -> float:
        """Bytes of scratch."""
        factors = self.all_factors * (self.stores.factors == "disk")
        return factors + self.all_blocks * (self.stores.weights == "disk")

    def steps(self) -> list[StepPlan]:
        """Return all steps, each of them once, in their order."""
        by_name: dict[str, StepPlan] = {}
        for stage in self._work.stages:
            for step in stage.needs(self):
                name = step.name
                by_name[name] = by_name[name].then(step) if name in by_name else step
        for stage in self._work.stages:
            for name, more in stage.beside(self).items():
                if name in by_name:
                    step = by_name[name]
                    device = step.device + more.device
                    by_name[name] = replace(step, device=device, host=step.host + more.host)
        return list(by_name.values())

    # What stages are made of

    def remembered(self, num_tokens: int) -> float:
        """Return the bytes of the dense model's last hidden states, bfloat16."""
        return 2.0 * self.hidden_size * num_tokens * self._blocks.is_last

    def measuring(self, name: str, texts: Sequence[tuple[int, int]]) -> StepPlan:
        """Return passes forward.

        Args:
            name: of the step.
            texts: number and length of the windows of each text.
        """
        peak = 0.0
        tokens = 0
        loads = 0
        for count, length in texts:
            own = -(-count // self.num_replicas)
            wave = min(self.stores.wave, own)
            between = 3 + 3 * (self.num_shards > 1)
            moment = max(length * (self._forward_only + 4 * length * self._scores), self._head)
            peak = max(peak, between * wave * length * self._hidden + moment)
            tokens += own * length
            loads += -(-own // wave)
        flops = tokens * (2 * self.active + 2 * self.head_flops)
        host = self.host + max((self.travelling(length) for _, length in texts), default=0.0)
        moved = self.moved(self.stores.weights, loads * self.all_blocks)
        return StepPlan(name, self.weights + peak, host, flops, 0.0, *moved)

    def writing(self, name: str, texts: Sequence[tuple[int, int]]) -> StepPlan:
        """Return the writing of texts, token by token, with their keys and values.

        Args:
            name: of the step.
            texts: number of texts that are written together, and tokens of each.
        """
        heads = self.shapes.layout.heads
        # keys and values of a token in a block
        of_token = 1.0 * heads.num_kv * (heads.query_dim + heads.value_dim) * self.shapes.width
        most = 0.0
        flops = 0.0
        num_passes = 0
        for num_texts, length in texts:
            batches = num_batches(num_texts, length)
            batch = -(-num_texts // batches)
            rounds = -(-batches // self.num_replicas)  # a batch is one replica's
            own = min(num_texts, rounds * batch)
            cached = of_token * (length + TOKENS_OF_ROOM)
            # those of a block are copied when they grow
            in_blocks = min(own, batch * self.num_shards) * len(self._own)
            caches = cached * (in_blocks + batch)
            logits = 20 * self.shapes.layout.config.vocab_size if self.head_flops else 0
            most = max(most, caches + batch * (self._moment + logits))
            flops += own * length * (2 * self.active + self.head_flops)
            num_passes += length * rounds
        moved = self.moved(self.stores.weights, num_passes * self.all_blocks)
        return StepPlan(name, self.weights + most, self.host, flops, 0.0, *moved)

    def passing(self, *, more_kept: float = 0.0, more_in_a_moment: float = 0.0) -> float:
        """Return the device's bytes of a pass forward and backward.

        These are what waits for its backward pass, and the moment that needs most.

        Args:
            more_kept: bytes of a token in a block beside its own activations.
            more_in_a_moment: likewise, while a block runs backward.
        """
        T = self.sequence_length
        num_blocks = len(self._own)
        of_wave = self.wave * T * self._hidden
        scores = T * self._scores
        kept = self._kept + more_kept + 2 * scores
        moment = self._moment + more_in_a_moment + 4 * scores
        widest = max((linear.num_columns for linear in self.gathered), default=0)
        conversion = 4 * (T + 256) * widest
        # what is packed and unpacked on the way
        waiting: float = 2 * of_wave + 3 * of_wave * (self.num_shards > 1)
        if self.stores.activations == "keep":
            waiting += self._in_flight * self.wave * T * kept * num_blocks
            return waiting + max(T * moment + conversion, self._head)
        waiting += self._in_flight * num_blocks * of_wave
        return waiting + max(T * (kept + moment) + conversion, self._head)

    def travelling(self, length: int) -> float:
        """Return the host's bytes of a GPU's hidden states that travel.

        That is a copy each way, and what waits between shards.
        """
        if self.device_is_host or self.num_shards == 1:
            return 0.0
        return float((2 + self._in_flight) * self.wave * length * self._hidden)

    def linear_by_linear(
        self, name: str, sizes: Sequence[float], flops: Sequence[float], kept: float = 0.0
    ) -> StepPlan:
        """Return a step in which linears have their turns, each on the replica that owns it.

        Args:
            name: of the step.
            sizes: bytes on the device of each linear.
            flops: of each linear, in float32.
            kept: bytes on the device of all linears together.
        """
        factors = self.all_factors / self.num_replicas
        on_device = factors * (self.stores.factors == "device")
        device = self.idle + on_device + kept / self.num_replicas + max(sizes, default=0.0)
        host = self.host + factors * (self.stores.factors == "host" and self.device_is_host)
        moved = self.moved(self.stores.factors, factors)
        return StepPlan(name, device, host, 0.0, sum(flops) / self.num_replicas, *moved)

    def block_by_block(self, name: str, of_linears: Sequence[tuple[float, float]]) -> StepPlan:
        """Return a step in which linears change while all sequences pass.

        It needs a block's second moments and one linear at a time.

        Args:
            name: of the step.
            of_linears: bytes and operations of each linear.
        """
        T = self.sequence_length
        moments = max(
            sum(4 * linear.num_columns**2 for linear in self.shapes.linears[block])
            for block in self._own
        )
        forward = T * (self._forward_only + 4 * T * self._scores)
        widest = max(linear.num_columns for linear in self.linears)
        passing = self.sequences * T * self._hidden + forward + 4 * T * widest
        device = self.weights + passing + moments + max(size for size, _ in of_linears)
        flops = self.sequences * T * 4 * self.active
        in_float32 = sum(flops for _, flops in of_linears) / self.num_replicas
        host = self.host + moments * (self.stores.factors == "host")
        moved = self.moved(self.stores.weights, 2 * self.all_blocks)
        return StepPlan(name, device, host, flops, in_float32, *moved)

    @staticmethod
    def moved(where: Place, size: float) -> tuple[float, float]:
        """Return the bytes that move between host and device, and between disk and host."""
        if where == "device":
            return 0.0, 0.0
        return (size, 0.0) if where == "host" else (size, size)
