"""What every step of a job needs on a worker, by arithmetic on shapes.

That is memory, operations, and bytes that move.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.maths.reconstruction import TOKENS_AT_A_TIME
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
from ray_surgeon.runtime.saving import FILE_BYTES

PROCESS_BYTES = (328 + 60) * 2**20
"""Anonymous memory of a worker beside its tensors."""


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


@dataclass(frozen=True)
class Job:
    """What a plan depends on beside model, placement and memory."""

    dtype: str  # of weights and activations
    num_sequences: int  # of the calibration
    sequence_length: int
    evaluation: tuple[tuple[int, int], ...]  # number and length of the windows of each text
    needs: Mapping[str, LinearNeeds]  # of the linears that are ranked or updated
    factors: (
        str  # "both" A and G, "A" alone, or "none" are gathered in a pass over the calibration text
    )
    gathered: frozenset[str]  # linears whose factors are gathered
    # whether the pass also finds out what every token's layer would give without each of its
    # experts
    ranks_experts: bool = False
    num_passes: int = 1  # over the calibration text before the costs of a shot
    num_backward: int | None = None  # sequences that pass backward, too, if not all
    dense_bytes: Mapping[str, float] = field(
        default_factory=dict
    )  # linear -> bytes of further terms that are not packed
    mask_bytes: float = 0.0  # of one entry of a linear, in the host's memory
    block_by_block: bool = (
        False  # whether all sequences pass a shard together while its blocks are pruned
    )
    # whether the dense model's states of the calibration text are kept, as those of evaluations are
    remembers_calibration: bool = False
    rounds: bool = False  # whether a quantised export is rounded by the calibration text
    written: tuple[
        tuple[int, int], ...
    ] = ()  # number of texts that the dense model writes, and tokens of each
    answers: bool = False  # whether the pruned model writes answers in evaluations
    num_searched: int = 0  # sequences on which a search measures; 0 for no search
    num_trials: int = 0  # of allocations in a search
    # measurements with removals undone, of one kind of groups in one block each, in all of them
    num_undone: int = 0
    reconstructed: frozenset[str] = (
        frozenset()
    )  # last linears of the layers that are trained to give what they gave before
    tokens_per_step: int = 0  # of their training
    num_epochs: int = 0  # likewise, over the calibration tokens
    lora_rank: int = 0  # of corrections; 0 for none
    num_correction_sequences: int = 0  # that pass in the corrections of a shot
    num_correction_states: int = (
        0  # of corrections that are kept beside the present one: the best so far
    )


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
        """Return the expected time."""
        computing = self.flops / device.flops[dtype] + self.float32_flops / device.float32_flops
        moving = (
            self.host_bytes / device.host_bytes_per_s + self.disk_bytes / device.disk_bytes_per_s
        )
        return self.bubble * (
            computing + moving
        )  # factors do not move while something computes; that weights do is not counted on


class Shapes:
    """Sizes of a model's parts, each computed once."""

    def __init__(self, layout: ModelLayout, job: Job) -> None:
        self.layout = layout
        self.width = getattr(torch, job.dtype).itemsize
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
        self.share_active = layout.num_active_experts / max(
            1, layout.num_experts
        )  # of an expert's tokens, of all
        self.active_parameters = [  # of every block's linears, what a token is multiplied with
            sum(
                linear.size * (1.0 if linear.expert is None else self.share_active)
                for linear in linears
            )
            for linears in self.linears
        ]
        self._factor_sizes = [self._factors(block, job) for block in range(layout.num_blocks)]
        self.factor_bytes = [sum(sizes) for sizes in self._factor_sizes]
        self.pinned_bytes = functools.cache(self._pinned_bytes)
        self._outside: dict[tuple[bool, bool], int] = {}
        # consumer -> parameters of a layer that is reconstructed, with its producers', a fused
        # one's once
        self.layer_sizes = {
            groups.consumer: sum(
                layout.shapes[name].size
                for name in {groups.consumer, *(name for name, _ in groups.producers)}
            )
            for groups in (layout.group_sets if job.reconstructed else ())
            if groups.consumer in job.reconstructed
        }

    def _factors(self, block: int, job: Job) -> list[int]:
        if job.factors == "none":
            return []
        gathered = [linear for linear in self.linears[block] if linear.name in job.gathered]
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


class WorkerNeeds:
    """One worker and what its steps need."""

    def __init__(
        self,
        shapes: Shapes,
        placement: Placement,
        job: Job,
        stores: Stores,
        device_is_host: bool,
        shard: int,
        blocks: BlockRange,
    ) -> None:
        self._shapes = shapes
        self._job = job
        self._stores = stores
        self._blocks = blocks
        self._num_shards = placement.num_shards
        self._num_replicas = placement.num_replicas
        self._own = range(blocks.first, blocks.last)
        self._linears = [linear for block in self._own for linear in shapes.linears[block]]
        self._of_needs = [
            job.needs[linear.name] for linear in self._linears if linear.name in job.needs
        ]
        config = shapes.layout.config
        self._hidden = int(config.hidden_size) * shapes.width  # bytes of a token's hidden state
        # weights
        sizes = [shapes.block_bytes[block] for block in self._own]
        self._all_blocks = sum(sizes)
        self._outside = shapes.outside_bytes(blocks)
        self._active = sum(shapes.active_parameters[block] for block in self._own)
        resident = self._all_blocks if stores.weights == "device" else 0
        copies = (
            0 if device_is_host or resident else 2 * max(sizes)
        )  # on the CPU a block runs where it lies, else the next one is ahead
        self._idle = self._outside + resident
        self._weights = self._outside + resident + copies
        self._masks = job.mask_bytes * sum(linear.size for linear in self._linears)
        self._host = self._masks
        self._is_pinned = not device_is_host
        if self._is_pinned and "host" in (
            stores.weights,
            stores.factors,
        ):  # what was a factor's stays torch's
            self._host += sum(
                s
                for s, at in zip(
                    shapes.pinned_bytes(blocks), (stores.weights, stores.factors), strict=True
                )
                if at == "host"
            )
        elif stores.weights == "host":
            self._host += self._all_blocks
        self._host += self._remembered(config.hidden_size) if blocks.is_last else 0
        self._layers = [linear for linear in self._linears if linear.name in job.reconstructed]
        self._owners = [placement.owners[linear.shared_input] for linear in self._layers]
        N = self._num_replicas
        num_backward = 0 if job.factors == "A" else job.num_backward or job.num_sequences
        self._backward = -(-num_backward // N)  # sequences of the replica that has most of them
        inputs_of_layer = (
            2.0 * job.num_sequences * job.sequence_length * config.hidden_size
        )  # bfloat16
        part = (
            self._backward + -(-(job.num_sequences - num_backward) // N)
        ) / job.num_sequences  # of a layer's inputs, at most
        self._inputs_moving = inputs_of_layer * self._layers_at_once(part)
        self._inputs = inputs_of_layer * max(map(self._owners.count, self._owners), default=0)
        self._all_factors = sum(shapes.factor_bytes[block] for block in self._own)
        self._dense = sum(job.dense_bytes.get(linear.name, 0.0) for linear in self._linears)
        # sequences
        self._sequences = -(-job.num_sequences // placement.num_replicas)
        self._wave = min(stores.wave, self._sequences)
        self._num_waves = -(-self._sequences // self._wave)
        self._in_flight = min(self._num_waves, placement.num_shards - shard)
        of_experts = (
            shapes.layout.num_active_experts * int(config.hidden_size) if job.ranks_experts else 0
        )
        found = {
            "width": shapes.width,
            "hidden": int(config.hidden_size),
            "share_active": shapes.share_active,
            "of_experts": of_experts,
            "eager_heads": shapes.layout.heads.num_query
            * (shapes.layout.family.runs_attention == "eager"),
        }
        sides = [ActivationBytes.of(shapes.linears[block], **found) for block in self._own]
        self._scores = sides[0].scores
        self._kept = max(side.kept for side in sides)
        self._moment = max(side.moment for side in sides)
        self._forward_only = max(side.forward_only for side in sides)
        self._head = (
            bytes_at_the_head(config.vocab_size, shapes.width, on_cpu=device_is_host)
            if blocks.is_last
            else 0
        )
        self._head_flops = (
            2 * config.vocab_size * config.hidden_size if blocks.is_last else 0
        )  # of a token, forward

    def _remembered(self, hidden_size: int) -> float:
        """Return the bytes of the dense model's hidden states, bfloat16."""
        job = self._job
        tokens = (
            sum(count * length for count, length in job.evaluation)
            + job.num_searched * job.sequence_length
        )
        return (
            2.0
            * hidden_size
            * (tokens + job.num_sequences * job.sequence_length * job.remembers_calibration)
        )

    def _layers_at_once(self, part: float) -> float:
        """Return of how many layers a replica has the inputs at most.

        These are a part of those that are not sent yet, and all of its own.
        """
        N = self._num_replicas
        num_layers = len(self._layers)
        most = 0.0
        for replica in range(N):
            for number in range(num_layers):
                own = self._owners[: number + 1].count(replica)
                most = max(
                    most, own + (num_layers - number + 1) * part if N > 1 else num_layers
                )  # one part more is on its way
        return most

    @property
    def disk_bytes(self) -> float:
        """Bytes of scratch."""
        return self._all_factors * (self._stores.factors == "disk") + self._all_blocks * (
            self._stores.weights == "disk"
        )

    def steps(self) -> Iterator[StepPlan]:
        """Yield the steps of a shot, those before the first one included."""
        yield StepPlan("load", self._weights, self._host + self._shapes.largest_tensor)
        if self._job.written:
            yield self._sampling()
        measuring = self._measuring("evaluation", self._job.evaluation)
        yield (
            replace(measuring, device=max(measuring.device, self._sampling().device))
            if self._job.answers
            else measuring
        )
        if self._job.factors != "none":
            yield self._curvature()
        if self._job.block_by_block:
            sizes = [(n.update_bytes, n.update_flops) for n in self._of_needs]
            yield self._block_by_block("update", sizes)
        elif self._job.needs:  # of any shard: all have the same steps
            yield self._linear_by_linear(
                "costs",
                [n.costs_bytes for n in self._of_needs],
                [n.costs_flops for n in self._of_needs],
            )
            if self._job.num_searched:
                yield self._search()
            yield (
                self._with_reconstruction(self._updates("update"))
                if self._layers
                else self._updates("update")
            )
        if self._job.lora_rank:
            yield self._correction()
        written = max(
            min(FILE_BYTES, self._all_blocks + self._outside), self._shapes.largest_stored
        )
        yield StepPlan("commit", self._idle, self._host + written, disk_bytes=self._all_blocks)
        if self._job.rounds:
            shapes = [(linear.num_rows, linear.num_columns) for linear in self._linears]
            yield self._block_by_block(
                "quantise",
                [(16.0 * (C**2 + R * C), 2 / 3 * C**3 + 2.0 * R * C**2) for R, C in shapes],
            )

    def _sampling(self) -> StepPlan:
        """Return the writing of calibration text, token by token.

        It needs keys and values of the texts that are written together.
        """
        heads = self._shapes.layout.heads
        most = 0.0
        flops = 0.0
        num_passes = 0
        of_token = (
            1.0 * heads.num_kv * (heads.query_dim + heads.value_dim) * self._shapes.width
        )  # keys and values in a block
        for num_texts, length in self._job.written:
            batches = num_batches(num_texts, length)
            batch = -(-num_texts // batches)
            rounds = -(-batches // self._num_replicas)  # a batch is one replica's
            own = min(num_texts, rounds * batch)
            cached = of_token * (length + TOKENS_OF_ROOM)  # of a text
            caches = cached * (
                min(own, batch * self._num_shards) * len(self._own) + batch
            )  # those of a block are copied when they grow
            moment = batch * (
                self._moment
                + (20 * self._shapes.layout.config.vocab_size if self._head_flops else 0)
            )
            most = max(most, caches + moment)
            flops += own * length * (2 * self._active + self._head_flops)
            num_passes += length * rounds
        moved = self._moved(self._stores.weights, num_passes * self._all_blocks)
        return StepPlan("sampling", self._weights + most, self._host, flops, 0.0, *moved)

    def _search(self) -> StepPlan:
        """Return the passes of a search.

        Factors stay where they are, and the host keeps every consumer's other weight.
        """
        job = self._job
        factors = self._all_factors / self._num_replicas
        passes = self._measuring("search", ((job.num_searched, job.sequence_length),))
        update = self._updates("search")
        device = max(passes.device + factors * (self._stores.factors == "device"), update.device)
        twice = self._shapes.width * sum(
            linear.size for linear in self._linears if linear.name in job.needs
        )
        host = update.host + passes.host - self._host + twice
        num_passes = job.num_trials + job.num_undone
        moved = [
            num_passes * of_pass + job.num_trials * of_update
            for of_pass, of_update in (
                (passes.host_bytes, update.host_bytes),
                (passes.disk_bytes, update.disk_bytes),
            )
        ]
        return StepPlan(
            "search",
            device,
            host,
            num_passes * passes.flops,
            job.num_trials * update.float32_flops,
            *moved,
        )

    def _measuring(self, name: str, texts: Sequence[tuple[int, int]]) -> StepPlan:
        peak = 0.0
        tokens = 0
        loads = 0
        for count, length in texts:
            own = -(-count // self._num_replicas)
            wave = min(self._stores.wave, own)
            between = 3 + 3 * (self._num_shards > 1)
            moment = max(length * (self._forward_only + 4 * length * self._scores), self._head)
            peak = max(peak, between * wave * length * self._hidden + moment)
            tokens = tokens + own * length
            loads = loads + -(-own // wave)
        flops = tokens * (2 * self._active + 2 * self._head_flops)
        host = self._host + max((self._travelling(length) for _, length in texts), default=0.0)
        return StepPlan(
            name,
            self._weights + peak,
            host,
            flops,
            0.0,
            *self._moved(self._stores.weights, loads * self._all_blocks),
        )

    def _passing(self, more_kept: float = 0.0) -> float:
        """Return the bytes of a pass forward and backward.

        These are what waits for its backward pass, and the moment that needs most.

        Args:
            more_kept: bytes of a token in a block beside its own activations.
        """
        T = self._job.sequence_length
        num_blocks = len(self._own)
        wave = self._wave * T * self._hidden
        scores = T * self._scores
        kept = self._kept + more_kept + 2 * scores
        moment = self._moment + 4 * scores
        conversion = max(
            (
                4 * (T + 256) * linear.num_columns
                for linear in self._linears
                if linear.name in self._job.gathered
            ),
            default=0,
        )
        waiting: float = 2 * wave + 3 * wave * (
            self._num_shards > 1
        )  # what is packed and unpacked on the way
        if self._stores.activations == "keep":
            waiting += self._in_flight * self._wave * T * kept * num_blocks
            return waiting + max(T * moment + conversion, self._head)
        waiting += self._in_flight * num_blocks * wave
        return waiting + max(T * (kept + moment) + conversion, self._head)

    def _travelling(self, length: int) -> float:
        """Return the host's bytes of a GPU's hidden states that travel.

        That is a copy each way, and what waits between shards.
        """
        return float(
            self._is_pinned
            * (self._num_shards > 1)
            * (2 + self._in_flight)
            * self._wave
            * length
            * self._hidden
        )

    def _curvature(self) -> StepPlan:
        stores = self._stores
        job = self._job
        on_device = (
            self._all_factors
            if stores.factors == "device"
            else max(self._shapes.factor_bytes[block] for block in self._own)
        )
        on_host = self._all_factors * (stores.factors == "host" and not self._is_pinned)
        backward = self._backward
        waves_backward = -(-self._backward // self._wave)
        forward = (1 + job.ranks_experts) * 2 * self._active + self._all_factors / 2
        head = self._head_flops * (backward or self._sequences)  # forward
        further = (
            1 + (stores.activations == "recompute")
        ) * 2 * self._active + 2 * self._head_flops
        flops = (
            job.num_passes
            * job.sequence_length
            * (self._sequences * forward + head + backward * further)
        )
        weights = self._moved(stores.weights, (self._num_waves + waves_backward) * self._all_blocks)
        factors = self._moved(stores.factors, 2 * self._num_waves * self._all_factors)
        moved = [
            job.num_passes * (one + other) for one, other in zip(weights, factors, strict=True)
        ]
        bubble = (self._num_waves + self._num_shards - 1) / self._num_waves
        device = self._weights + on_device + self._dense + self._passing()
        host = self._host + on_host + self._inputs_moving + self._travelling(job.sequence_length)
        return StepPlan("curvature", device, host, flops, 0.0, moved[0], moved[1], bubble)

    def _updates(self, name: str) -> StepPlan:
        return self._linear_by_linear(
            name, [n.update_bytes for n in self._of_needs], [n.update_flops for n in self._of_needs]
        )

    def _with_reconstruction(self, update: StepPlan) -> StepPlan:
        """Return the update with the training of layers, one at a time.

        It needs a layer's states, and inputs and outputs of all tokens.
        """
        job = self._job
        width = self._shapes.width
        hidden = int(self._shapes.layout.config.hidden_size)
        tokens = job.num_sequences * job.sequence_length
        sizes = [self._shapes.layer_sizes[linear.name] for linear in self._layers]
        together = max(
            4 * TOKENS_AT_A_TIME, 7 * min(tokens, job.tokens_per_step)
        )  # hidden entries: forward alone, or backward, too
        at_a_time = together * (
            width * max(linear.num_columns for linear in self._layers) + 4 * hidden
        )
        states = max(sizes) * (28 + 2 * width) + 4 * max(
            linear.size for linear in self._layers
        )  # and the consumer that is returned
        device = self._idle + states + tokens * hidden * (2 + 2 * width) + at_a_time
        device += self._all_factors / self._num_replicas * (self._stores.factors == "device")
        # whole, and in every epoch left, its weights' gradients and those of the hidden entries
        of_token = [
            2 * size + job.num_epochs * (4 * size + 2 * linear.size)
            for size, linear in zip(sizes, self._layers, strict=True)
        ]
        of_owners = [
            sum(n for n, one in zip(of_token, self._owners, strict=True) if one == owner)
            for owner in set(self._owners)
        ]
        flops = tokens * max(of_owners)
        return replace(update, device=max(update.device, device), flops=flops)

    def _linear_by_linear(
        self, name: str, sizes: Sequence[float], flops: Sequence[float]
    ) -> StepPlan:
        """Return a step in which linears have their turns, each on the replica that owns it."""
        factors = self._all_factors / self._num_replicas
        kept = sum(n.kept_bytes for n in self._of_needs) / self._num_replicas
        device = (
            self._idle
            + factors * (self._stores.factors == "device")
            + self._dense
            + kept
            + max(sizes, default=0.0)
        )
        host = (
            self._host
            + factors * (self._stores.factors == "host" and not self._is_pinned)
            + self._inputs
        )
        return StepPlan(
            name,
            device,
            host,
            0.0,
            sum(flops) / self._num_replicas,
            *self._moved(self._stores.factors, factors),
        )

    def _block_by_block(self, name: str, of_linears: Sequence[tuple[float, float]]) -> StepPlan:
        """Return a step in which linears change while all sequences pass.

        It needs a block's second moments and one linear at a time.

        Args:
            name: of the step.
            of_linears: bytes and operations of each linear.
        """
        T = self._job.sequence_length
        moments = max(
            sum(4 * linear.num_columns**2 for linear in self._shapes.linears[block])
            for block in self._own
        )
        forward = T * (self._forward_only + 4 * T * self._scores)
        passing = (
            self._sequences * T * self._hidden
            + forward
            + max(4 * T * linear.num_columns for linear in self._linears)
        )
        device = self._weights + passing + moments + max(size for size, _ in of_linears)
        flops = self._sequences * T * 4 * self._active
        in_float32 = sum(flops for _, flops in of_linears) / self._num_replicas
        host = self._host + moments * (self._stores.factors == "host")
        return StepPlan(
            name,
            device,
            host,
            flops,
            in_float32,
            *self._moved(self._stores.weights, 2 * self._all_blocks),
        )

    def _correction(self) -> StepPlan:
        """Return the training of B A.

        It needs inputs, A, B and gradients (between replicas one copy more), and Adam's moments at
        a linear's owner.

        Other states of them are kept beside the present one.
        """
        job = self._job
        blocks = len(self._own)
        N = self._num_replicas
        of_entry = 8 + (8 if N == 1 else 12 / N) + job.num_correction_states * (4 + 8 / N)
        adapters = (
            of_entry
            * job.lora_rank
            * sum(linear.num_rows + linear.num_columns for linear in self._linears)
        )
        inputs = self._shapes.width * sum(linear.num_columns for linear in self._linears) / blocks
        flops = 6 * self._active * job.num_correction_sequences * job.sequence_length
        loads = 2 * self._all_blocks * -(-job.num_correction_sequences // self._wave)
        product = 16.0 * max(
            linear.size for linear in self._linears
        )  # B A and copies: of elements in every pass, of others when absorbed
        passing = self._passing(inputs) + product * (self._masks > 0)
        device = (
            self._weights + adapters + self._masks * self._is_pinned + max(passing, product)
        )  # on a CPU they are those of the host
        moved = self._moved(self._stores.weights, loads)
        return StepPlan(
            "correction",
            device,
            self._host + self._travelling(job.sequence_length),
            flops,
            0.0,
            *moved,
        )

    @staticmethod
    def _moved(where: Place, size: float) -> tuple[float, float]:
        """Return the bytes that move between host and device, and between disk and host."""
        return (0.0, 0.0) if where == "device" else (size, 0.0) if where == "host" else (size, size)
