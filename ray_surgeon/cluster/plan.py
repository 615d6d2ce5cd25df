"""What a job needs on every worker, step by step, and where the workers keep things so that it fits: arithmetic on shapes.

The plan is a function of the model's configuration, the job and the memory there is. It chooses the fastest way that fits, or it says
which step binds and what would do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table

from ray_surgeon.cluster.placement import Placement, place
from ray_surgeon.memory.stores import Activations, Place, Stores
from ray_surgeon.models.layout import BlockRange, LinearShape, ModelLayout
from ray_surgeon.models.loss import TOKENS_PER_SLICE
from ray_surgeon.sections.memory import MemorySection
from ray_surgeon.surgery.kronecker import PackedSymmetric

_PROCESS_BYTES = 358 * 2**20
"""Anonymous memory of a worker that has imported everything and loaded nothing; measured with torch 2.13 and Ray 2.60 on Linux."""
_HEAP_BYTES = 60 * 2**20
"""What the C library's heap holds beside large tensors while linears have their turns; measured."""
_SAFE = 0.9
"""Of the memory there is, the fraction that is planned with."""
FILE_BYTES = 2**30
"""A file of weights has no more, unless one tensor has; what it holds is in memory while it is written."""


@dataclass(frozen=True)
class Device:
    """How fast a worker's device is: what it reaches on the products here, not its peak."""

    name: str
    flops: Mapping[str, float]  # per second, by dtype of the weights
    float32_flops: float  # of factorisations and products of the costs
    host_bytes_per_s: float  # between host and device
    disk_bytes_per_s: float  # between disk and host
    memory_bytes: float = 0.0  # of its own; 0 for the CPU

    def times(self, factor: float) -> Device:
        """Return a device that computes so many times as fast."""
        flops = {dtype: factor * rate for dtype, rate in self.flops.items()}
        return replace(self, flops=flops, float32_flops=factor * self.float32_flops)


DEVICES = {
    "h100": Device("h100", {"bfloat16": 4e14, "float16": 4e14, "float32": 4e13}, 4e13, 4e10, 3e9, 80e9),
    "a100": Device("a100", {"bfloat16": 1.5e14, "float16": 1.5e14, "float32": 1.5e13}, 1.5e13, 2e10, 3e9, 80e9),
    "l40s": Device("l40s", {"bfloat16": 1.5e14, "float16": 1.5e14, "float32": 4e13}, 4e13, 2e10, 3e9, 48e9),
    "cpu": Device("cpu", {"bfloat16": 1.2e11, "float16": 2e10, "float32": 7e10}, 7e10, 1e10, 1e9),
}
"""Devices by name: about 0.4 of the published dense rates; of the CPU one core of a server."""


@dataclass(frozen=True)
class Room:
    """Bytes that one worker may use. On the CPU the device's memory is the host's."""

    device: float
    host: float
    disk: float
    device_is_host: bool

    @staticmethod
    def smallest(rooms: Sequence[Room]) -> Room:
        """Return what every worker has."""
        device, host, disk = (min(getattr(room, name) for room in rooms) for name in ("device", "host", "disk"))
        return Room(device, host, disk, any(room.device_is_host for room in rooms))


@dataclass(frozen=True)
class LinearNeeds:
    """What a method needs for one linear beside its weight and packed factors. Bytes are on the device, while it is that linear's turn."""

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
    factors: str  # "both" A and G, "A" alone, or "none" are gathered in a pass over the calibration text
    gathered: frozenset[str]  # linears whose factors are gathered
    num_passes: int = 1  # over the calibration text before the costs of a shot
    dense_bytes: Mapping[str, float] = field(default_factory=dict)  # linear -> bytes of further terms that are not packed
    mask_bytes: float = 0.0  # of one entry of a linear, in the host's memory
    block_by_block: bool = False  # whether all sequences pass a shard together while its blocks are pruned
    lora_rank: int = 0  # of corrections; 0 for none
    num_correction_sequences: int = 0  # that pass in the corrections of a shot


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
        moving = self.host_bytes / device.host_bytes_per_s + self.disk_bytes / device.disk_bytes_per_s
        return self.bubble * (computing + moving)  # factors do not move while something computes; that weights do is not counted on


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's needs; replicas of a shard need the same."""

    shard: int
    first_block: int
    last_block: int  # inclusive
    steps: tuple[StepPlan, ...]
    disk: float  # bytes of scratch
    reserve: float  # bytes in the host's memory that are there before anything is loaded

    def peak(self, room: Room, step: StepPlan) -> tuple[float, float]:
        """Return the peak bytes of a step on the device and on the host; where these are one, all of them are the device's."""
        if room.device_is_host:
            return step.device + step.host + self.reserve, 0.0
        return step.device, step.host + self.reserve


@dataclass(frozen=True)
class Plan:
    """How a job runs."""

    stores: Stores
    workers: tuple[WorkerPlan, ...]  # one a shard
    num_replicas: int
    room: Room
    device: Device
    dtype: str

    @property
    def seconds(self) -> dict[str, float]:
        """Expected time of every step: that of the slowest worker."""
        names = [step.name for step in self.workers[0].steps]
        return {name: max(w.steps[i].seconds(self.device, self.dtype) for w in self.workers) for i, name in enumerate(names)}

    def peaks(self) -> dict[str, list[float]]:
        """Return the planned peak of every step on every shard's device, where that is the host's memory with the process's own."""
        return {step.name: [w.peak(self.room, w.steps[i])[0] for w in self.workers] for i, step in enumerate(self.workers[0].steps)}

    def as_record(self) -> dict[str, Any]:
        """Return what the report says of it; operations and bytes are those of all shards of one replica."""
        steps = list(enumerate(self.workers[0].steps))
        return {
            "stores": asdict(self.stores),
            "device": self.device.name,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "flops": {step.name: sum(w.steps[i].flops + w.steps[i].float32_flops for w in self.workers) for i, step in steps},
            "moved_bytes": {step.name: sum(w.steps[i].host_bytes + w.steps[i].disk_bytes for w in self.workers) for i, step in steps},
            "peak_bytes": {name: [int(peak) for peak in of_shards] for name, of_shards in self.peaks().items()},
            "disk_bytes": [int(worker.disk) for worker in self.workers],
        }

    def excess(self) -> tuple[float, str]:
        """Return the largest part of a memory that would be needed, and a sentence on where; at most 1 fits."""
        worst, on_device = (0.0, ""), "memory" if self.room.device_is_host else "device memory"
        for worker in self.workers:
            for step in worker.steps:
                device, host = worker.peak(self.room, step)
                for what, need, there in ((on_device, device, self.room.device), ("host memory", host, self.room.host)):
                    if need / there > worst[0]:
                        worst = (need / there, f"{step.name} on shard {worker.shard} needs {_gib(need)} of {what}, there are {_gib(there)}")
            if worker.disk / max(1.0, self.room.disk) > worst[0]:
                worst = (
                    worker.disk / max(1.0, self.room.disk),
                    f"shard {worker.shard} needs {_gib(worker.disk)} of disk, there are {_gib(self.room.disk)}",
                )
        return worst


class DoesNotFitError(ValueError):
    """No way to run the job fits the memory there is."""


def plan_job(layout: ModelLayout, placement: Placement, job: Job, wanted: MemorySection, room: Room, device: Device) -> Plan:
    """Choose the fastest way that fits.

    Args:
        layout: of the model.
        placement: of its blocks.
        job: what is done.
        wanted: what the spec fixes.
        room: of every worker.
        device: how fast it is.

    Raises:
        DoesNotFitError: nothing fits; names the step that binds, and what would do.
    """
    limit = math.inf if wanted.limit_gib is None else wanted.limit_gib * 2**30
    usable = replace(room, device=min(limit, _SAFE * room.device), host=_SAFE * room.host, disk=_SAFE * room.disk)
    shapes = _Shapes(layout, job)
    plans = [_plan(shapes, placement, job, stores, usable, device) for stores in _ways(job, placement, wanted, room)]
    fitting = [plan for plan in plans if plan.excess()[0] <= 1]
    if fitting:
        return min(fitting, key=lambda plan: sum(plan.seconds.values()))  # the first of equals, which is the simplest
    best = min(plans, key=lambda plan: plan.excess()[0])
    raise DoesNotFitError(
        f"memory: the job does not fit: {best.excess()[1]} (with weights: {best.stores.weights}, factors: {best.stores.factors}, "
        f"wave: {best.stores.wave}); {_remedy(shapes, placement, job, wanted, usable, device, best)}"
    )


def _ways(job: Job, placement: Placement, wanted: MemorySection, room: Room) -> Iterator[Stores]:
    """Yield what the spec allows, the simplest first."""
    per_replica = -(-job.num_sequences // placement.num_replicas)
    waves = [wanted.wave] if wanted.wave else [2**i for i in range(max(1, math.ceil(math.log2(per_replica)) + 1))]
    places: tuple[Place, ...] = ("device", "disk") if room.device_is_host else ("device", "host", "disk")
    of_weights: Sequence[Place] = places if wanted.weights == "auto" else [wanted.weights]
    of_factors: Sequence[Place] = places if wanted.factors == "auto" else [wanted.factors]
    of_activations: Sequence[Activations] = ("keep", "recompute") if wanted.activations == "auto" else [wanted.activations]
    for weights, factors, activations in itertools.product(of_weights, of_factors, of_activations):
        resident = (weights, factors) == ("device", "device")
        if activations == "keep" and not resident:
            continue
        for wave in waves if not resident or wanted.wave else waves[:1]:
            yield Stores(weights, factors, activations, min(wave, per_replica))


def _remedy(shapes: _Shapes, placement: Placement, job: Job, wanted: MemorySection, room: Room, device: Device, best: Plan) -> str:
    """Return the smallest change that would do."""

    def fits(num_shards: int) -> bool:
        other = place(shapes.layout, num_shards, placement.num_replicas)
        ways = (_plan(shapes, other, job, stores, room, device) for stores in _ways(job, other, wanted, room))
        return any(plan.excess()[0] <= 1 for plan in ways)

    most, fewest = shapes.layout.num_blocks, placement.num_shards
    remedies = []
    if fewest < most and fits(most):
        low, high = fewest, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        remedies.append(f"set cluster.num_shards: {high}, on as many such devices")
    free = wanted.model_copy(update={"weights": "auto", "factors": "auto", "activations": "auto", "wave": None})
    if free != wanted:
        ways = (_plan(shapes, placement, job, stores, room, device) for stores in _ways(job, placement, free, room))
        if any(plan.excess()[0] <= 1 for plan in ways):
            remedies.append("leave memory to the plan, which finds a way")
    remedies.append(f"or give workers with {best.excess()[0]:.2g} times that memory")
    return ", ".join(remedies).removeprefix("or ")


class _Shapes:
    """Sizes of a model's parts, each computed once."""

    def __init__(self, layout: ModelLayout, job: Job) -> None:
        self.layout, self.width = layout, getattr(torch, job.dtype).itemsize
        self.block_bytes = [0] * layout.num_blocks
        self.largest_tensor = 0
        for name, shape in layout.parameters.items():
            size = self.width * math.prod(shape)
            self.largest_tensor = max(self.largest_tensor, size)
            if (block := layout.block_of(name)) is not None:
                self.block_bytes[block] += size
        self.linears: list[list[LinearShape]] = [[] for _ in range(layout.num_blocks)]
        for linear in layout.linears:
            self.linears[linear.block].append(linear)
        self.factor_bytes = [sum(self._factors(block, job).values()) for block in range(layout.num_blocks)]

    def _factors(self, block: int, job: Job) -> dict[str, int]:
        sizes = {}
        for linear in self.linears[block]:
            if linear.name in job.gathered and job.factors != "none":
                sizes[f"{linear.shared_input}.A"] = 4 * PackedSymmetric.size(linear.num_columns)
                sizes[f"{linear.name}.G"] = 4 * PackedSymmetric.size(linear.num_rows)
        return sizes

    def outside_bytes(self, blocks: BlockRange) -> int:
        """Return the bytes of what a shard holds outside of its blocks."""
        whole = sum(math.prod(shape) for shape in self.layout.parameters_of(blocks).values()) * self.width
        return int(whole) - sum(self.block_bytes[blocks.first : blocks.last])


def _plan(shapes: _Shapes, placement: Placement, job: Job, stores: Stores, room: Room, device: Device) -> Plan:
    workers = []
    for shard, blocks in enumerate(placement.blocks):
        worker = _Worker(shapes, placement, job, stores, room.device_is_host, shard, blocks)
        workers.append(WorkerPlan(shard, blocks.first, blocks.last - 1, tuple(worker.steps()), worker.disk_bytes, _PROCESS_BYTES))
    return Plan(stores, tuple(workers), placement.num_replicas, room, device, job.dtype)


class _Worker:
    """One worker and what its steps need."""

    def __init__(
        self, shapes: _Shapes, placement: Placement, job: Job, stores: Stores, device_is_host: bool, shard: int, blocks: BlockRange
    ) -> None:
        self._shapes, self._job, self._stores, self._blocks = shapes, job, stores, blocks
        self._num_shards, self._num_replicas = placement.num_shards, placement.num_replicas
        self._own = range(blocks.first, blocks.last)
        self._linears = [linear for block in self._own for linear in shapes.linears[block]]
        self._of_needs = [job.needs[linear.name] for linear in self._linears if linear.name in job.needs]
        config = shapes.layout.config
        self._hidden = int(config.hidden_size) * shapes.width  # bytes of a token's hidden state
        # weights
        sizes = [shapes.block_bytes[block] for block in self._own]
        self._all_blocks, self._outside = sum(sizes), shapes.outside_bytes(blocks)
        resident = self._all_blocks if stores.weights == "device" else 0
        copies = 0 if device_is_host or resident else 2 * max(sizes)  # on the CPU a block runs where it lies, else the next one is ahead
        self._idle, self._weights = self._outside + resident, self._outside + resident + copies
        self._host = (self._all_blocks if stores.weights == "host" else 0) + job.mask_bytes * sum(linear.size for linear in self._linears)
        self._all_factors = sum(shapes.factor_bytes[block] for block in self._own)
        self._dense = sum(job.dense_bytes.get(linear.name, 0.0) for linear in self._linears)
        # sequences
        self._sequences = -(-job.num_sequences // placement.num_replicas)
        self._wave = min(stores.wave, self._sequences)
        self._num_waves = -(-self._sequences // self._wave)
        self._in_flight = min(self._num_waves, placement.num_shards - shard)
        sides = [_Activations.of(shapes.linears[block], int(config.hidden_size), shapes.width) for block in self._own]
        self._kept, self._moment = max(side.kept for side in sides), max(side.moment for side in sides)
        self._forward_only = max(side.forward_only for side in sides)
        self._head = TOKENS_PER_SLICE * config.vocab_size * (shapes.width + 20) if blocks.is_last else 0
        self._head_flops = 2 * config.vocab_size * config.hidden_size if blocks.is_last else 0  # of a token, forward

    @property
    def disk_bytes(self) -> float:
        """Bytes of scratch."""
        return self._all_factors * (self._stores.factors == "disk") + self._all_blocks * (self._stores.weights == "disk")

    def steps(self) -> Iterator[StepPlan]:
        """Yield the steps of a shot, those before the first one included."""
        yield StepPlan("load", self._weights, self._host + self._shapes.largest_tensor)
        yield self._evaluation()
        if self._job.factors != "none":
            yield self._curvature()
        if self._job.block_by_block:
            yield self._block_by_block()
        elif self._of_needs:
            yield self._linear_by_linear("costs", [n.costs_bytes for n in self._of_needs], [n.costs_flops for n in self._of_needs])
            yield self._linear_by_linear("update", [n.update_bytes for n in self._of_needs], [n.update_flops for n in self._of_needs])
        if self._job.lora_rank:
            yield self._correction()
        written = max(min(FILE_BYTES, self._all_blocks + self._outside), self._shapes.largest_tensor)
        yield StepPlan("commit", self._idle, self._host + written, disk_bytes=self._all_blocks)

    def _evaluation(self) -> StepPlan:
        peak, tokens, loads = 0.0, 0, 0
        for count, length in self._job.evaluation:
            own = -(-count // self._num_replicas)
            wave = min(self._stores.wave, own)
            between = 3 + 3 * (self._num_shards > 1)
            peak = max(peak, between * wave * length * self._hidden + max(length * self._forward_only, self._head))
            tokens, loads = tokens + own * length, loads + -(-own // wave)
        flops = tokens * (2 * self._all_blocks / self._shapes.width + self._head_flops)
        return StepPlan(
            "evaluation", self._weights + peak, self._host, flops, 0.0, *self._moved(self._stores.weights, loads * self._all_blocks)
        )

    def _passing(self, more_kept: float = 0.0) -> float:
        """Return the bytes of a pass forward and backward: what waits for its backward pass, and the moment that needs most.

        Args:
            more_kept: bytes of a token in a block beside its own activations.
        """
        T, num_blocks = self._job.sequence_length, len(self._own)
        wave = self._wave * T * self._hidden
        conversion = max((4 * (T + 256) * linear.num_columns for linear in self._linears if linear.name in self._job.gathered), default=0)
        waiting: float = 2 * wave + 3 * wave * (self._num_shards > 1)  # what is packed and unpacked on the way
        if self._stores.activations == "keep":
            waiting += self._in_flight * self._wave * T * (self._kept + more_kept) * num_blocks
            return waiting + max(T * self._moment + conversion, self._head)
        waiting += self._in_flight * num_blocks * wave
        return waiting + max(T * (self._kept + more_kept + self._moment) + conversion, self._head)

    def _curvature(self) -> StepPlan:
        stores, job = self._stores, self._job
        on_device = self._all_factors if stores.factors == "device" else max(self._shapes.factor_bytes[block] for block in self._own)
        on_host = self._all_factors if stores.factors == "host" else 0
        forward_only = job.factors == "A"
        passes = 1 if forward_only else 2 + (stores.activations == "recompute")
        products = passes * 2 * self._all_blocks / self._shapes.width + (1 if forward_only else 3) * self._head_flops
        flops = job.num_passes * self._sequences * job.sequence_length * (products + self._all_factors / 2)
        weights = self._moved(stores.weights, (1 if forward_only else 2) * self._num_waves * self._all_blocks)
        factors = self._moved(stores.factors, 2 * self._num_waves * self._all_factors)
        moved = [job.num_passes * (one + other) for one, other in zip(weights, factors, strict=True)]
        bubble = (self._num_waves + self._num_shards - 1) / self._num_waves
        device = self._weights + on_device + self._dense + self._passing()
        return StepPlan("curvature", device, self._host + on_host, flops, 0.0, moved[0], moved[1], bubble)

    def _linear_by_linear(self, name: str, sizes: Sequence[float], flops: Sequence[float]) -> StepPlan:
        """Return a step in which linears have their turns, each on the replica that owns it."""
        factors = self._all_factors / self._num_replicas
        kept = sum(n.kept_bytes for n in self._of_needs) / self._num_replicas
        device = self._idle + factors * (self._stores.factors == "device") + self._dense + kept + _HEAP_BYTES + max(sizes)
        host = self._host + factors * (self._stores.factors == "host")
        return StepPlan(name, device, host, 0.0, sum(flops) / self._num_replicas, *self._moved(self._stores.factors, factors))

    def _block_by_block(self) -> StepPlan:
        """Return the update of methods that prune while all sequences pass: a block's second moments and one linear at a time."""
        T = self._job.sequence_length
        moments = max(sum(4 * linear.num_columns**2 for linear in self._shapes.linears[block]) for block in self._own)
        passing = self._sequences * T * self._hidden + T * self._forward_only + max(4 * T * linear.num_columns for linear in self._linears)
        device = self._weights + passing + moments + _HEAP_BYTES + max(n.update_bytes for n in self._of_needs)
        flops = self._sequences * T * 4 * self._all_blocks / self._shapes.width
        in_float32 = sum(n.update_flops for n in self._of_needs) / self._num_replicas
        return StepPlan("update", device, self._host, flops, in_float32, *self._moved(self._stores.weights, 2 * self._all_blocks))

    def _correction(self) -> StepPlan:
        """Return the training of B A, of which each linear keeps its inputs, its two parameters, their gradients and Adam's moments."""
        job, blocks = self._job, len(self._own)
        adapters = 16 * job.lora_rank * sum(linear.num_rows + linear.num_columns for linear in self._linears)
        inputs = self._shapes.width * sum(linear.num_columns for linear in self._linears) / blocks
        flops = 6 * self._all_blocks / self._shapes.width * job.num_correction_sequences * job.sequence_length
        loads = 2 * self._all_blocks * -(-job.num_correction_sequences // self._wave)
        device = self._weights + adapters + self._passing(inputs)
        return StepPlan("correction", device, self._host, flops, 0.0, *self._moved(self._stores.weights, loads))

    @staticmethod
    def _moved(where: Place, size: float) -> tuple[float, float]:
        """Return the bytes that move between host and device, and between disk and host."""
        return (0.0, 0.0) if where == "device" else (size, 0.0) if where == "host" else (size, size)


@dataclass(frozen=True)
class _Activations:
    """Bytes that a block needs for a token, fitted to measurements of Llama-2-7B's blocks in bfloat16 and SmolLM2's in float32."""

    kept: float  # from its forward to its backward pass
    moment: float  # more while it runs backward
    forward_only: float  # without gradients

    @staticmethod
    def of(linears: Sequence[LinearShape], hidden: int, width: int) -> _Activations:
        """Count outputs of linears, the product in the feed-forward layer, attention's copies, and what norms keep in float32."""
        outputs, widest = sum(linear.num_rows for linear in linears), max(linear.num_columns for linear in linears)
        norms = 8 * hidden if width < 4 else 0
        kept = width * (outputs + widest + 4 * hidden) + norms
        return _Activations(kept, width * 4 * widest + 12 * hidden, width * 3 * widest + 4 * hidden)


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table: for every shard the peak of each step; operations, bytes that move and the expected time of each."""
    stores, steps = plan.stores, [step.name for step in plan.workers[0].steps]
    how = f"weights: {stores.weights}, factors: {stores.factors}, activations: {stores.activations}, wave: {stores.wave}"
    table = Table(
        title=f"{len(plan.workers)} shards x {plan.num_replicas} replicas; {how}; GiB of a worker's device at the peak of each step"
    )
    for column in ("shard", "blocks", *steps, "host", "disk"):
        table.add_column(column, justify="right")
    for worker in plan.workers:
        peaks = [worker.peak(plan.room, step) for step in worker.steps]
        sizes = [*(device for device, _ in peaks), max(host for _, host in peaks), worker.disk]
        table.add_row(str(worker.shard), f"{worker.first_block}-{worker.last_block}", *(f"{size / 2**30:.2f}" for size in sizes))
    table.add_section()
    record = plan.as_record()
    table.add_row("all", "TFLOP", *(f"{flops / 1e12:.3g}" for flops in record["flops"].values()), "", "")
    table.add_row("all", "GB moved", *(f"{size / 1e9:.3g}" for size in record["moved_bytes"].values()), "", "")
    table.add_row("slowest", plan.device.name, *(_time(seconds) for seconds in plan.seconds.values()), "", "")
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
