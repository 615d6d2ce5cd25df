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

_PROCESS_BYTES = 330 * 2**20
"""Anonymous memory of a worker that has imported everything and loaded nothing; measured with torch 2.13 and Ray 2.60 on Linux."""
_SAFE = 0.9
"""Of the memory there is, the fraction that is planned with."""
_FILE_BYTES = 2**30
"""A file of weights has no more, unless one tensor has; a part is in memory while it is written."""


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
        return self.bubble * max(computing, moving)


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
            "moved_bytes": {step.name: sum(w.steps[i].host_bytes for w in self.workers) for i, step in steps},
            "peak_bytes": {name: [int(peak) for peak in of_shards] for name, of_shards in self.peaks().items()},
            "disk_bytes": [int(worker.disk) for worker in self.workers],
        }

    def excess(self) -> tuple[float, str]:
        """Return the largest part of a memory that would be needed, and a sentence on where; at most 1 fits."""
        worst = (0.0, "")
        for worker in self.workers:
            for step in worker.steps:
                device, host = worker.peak(self.room, step)
                for what, need, there in (("device memory", device, self.room.device), ("host memory", host, self.room.host)):
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
    factor = best.excess()[0] / _SAFE * _SAFE
    remedies.append(f"or give workers with {factor:.2g} times that memory")
    return ", ".join(remedies).removeprefix("or ")


class _Shapes:
    """Sizes of a model's parts, each computed once."""

    def __init__(self, layout: ModelLayout, job: Job) -> None:
        self.layout, self.width = layout, getattr(torch, job.dtype).itemsize
        inside = f"{layout.family.base}.{layout.family.blocks}."
        self.block_bytes = [0] * layout.num_blocks
        self.largest_tensor = 0
        for name, shape in layout.parameters.items():
            size = self.width * math.prod(shape)
            self.largest_tensor = max(self.largest_tensor, size)
            if name.startswith(inside):
                self.block_bytes[int(name.removeprefix(inside).partition(".")[0])] += size
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
    workers = tuple(_plan_worker(shapes, placement, job, stores, room, shard, blocks) for shard, blocks in enumerate(placement.blocks))
    return Plan(stores, workers, placement.num_replicas, room, device, job.dtype)


def _plan_worker(shapes: _Shapes, placement: Placement, job: Job, stores: Stores, room: Room, shard: int, blocks: BlockRange) -> WorkerPlan:
    layout, width, T = shapes.layout, shapes.width, job.sequence_length
    hidden, own = layout.config.hidden_size * width, range(blocks.first, blocks.last)
    linears = [linear for block in own for linear in shapes.linears[block]]
    sizes = [shapes.block_bytes[block] for block in own]
    factors = [shapes.factor_bytes[block] for block in own]
    # weights
    outside, all_blocks, largest = shapes.outside_bytes(blocks), sum(sizes), max(sizes)
    on_disk_only = room.device_is_host and stores.weights == "disk"  # blocks are mapped into memory, no copy of them is made
    at_once = 0 if on_disk_only or (room.device_is_host and stores.weights == "host") else largest * (1 if room.device_is_host else 2)
    weights = outside + (all_blocks if stores.weights == "device" else at_once)
    idle = outside + (all_blocks if stores.weights == "device" else 0)  # while linears have their turns
    weights_host = all_blocks if stores.weights == "host" else 0
    masks = job.mask_bytes * sum(linear.size for linear in linears)
    # factors
    all_factors, share = sum(factors), 1 / placement.num_replicas
    gathering = all_factors if stores.factors == "device" else max(factors)
    gathering_host = all_factors if stores.factors == "host" else 0
    dense = sum(job.dense_bytes.get(linear.name, 0.0) for linear in linears)
    # activations
    per_replica = -(-job.num_sequences // placement.num_replicas)
    wave = min(stores.wave, per_replica)
    waves = -(-per_replica // wave)
    in_flight = min(waves, placement.num_shards - shard)
    with_gradient = max(_bytes_per_token(shapes.linears[block], hidden, width) for block in own)
    forward_only = max(_forward_bytes_per_token(shapes.linears[block], hidden, width) for block in own)
    conversion = max((4 * T * linear.num_columns for linear in linears if linear.name in job.gathered), default=0) if width < 4 else 0
    vocabulary = layout.config.vocab_size
    head = (TOKENS_PER_SLICE * vocabulary * (width + 12) if blocks.is_last else 0) + 4 * T * hidden * blocks.is_last
    between = 3 * wave * T * hidden if placement.num_shards > 1 else 0  # what is packed and unpacked on the way
    if stores.activations == "keep":
        passing = in_flight * wave * T * with_gradient * len(own) + wave * T * hidden + between
    else:
        passing = (in_flight * len(own) + 2) * wave * T * hidden + T * with_gradient + between
    passing += conversion
    steps = [StepPlan("load", weights, weights_host + masks + shapes.largest_tensor * (not on_disk_only))]
    for number, (count, length) in enumerate(job.evaluation):
        windows = min(stores.wave, -(-count // placement.num_replicas))
        flows = (
            2 * windows * length * hidden
            + length * forward_only
            + head
            + (3 * windows * length * hidden if placement.num_shards > 1 else 0)
        )
        tokens = -(-count // placement.num_replicas) * length
        moved = -(-count // placement.num_replicas // windows) * all_blocks
        flops = tokens * (2 * all_blocks / width + (2 * vocabulary * layout.config.hidden_size if blocks.is_last else 0))
        step = StepPlan("evaluation", weights + flows, weights_host + masks, flops, 0.0, *_moved(stores.weights, moved))
        if number == 0 or step.device > steps[-1].device:
            steps = [s for s in steps if s.name != "evaluation"] + [
                replace(step, flops=sum(c * n for c, n in job.evaluation) * step.flops / (count * length))
            ]
    needs = [job.needs[linear.name] for linear in linears if linear.name in job.needs]
    if job.factors != "none":
        steps.append(
            _curvature(
                shapes,
                placement,
                job,
                stores,
                blocks,
                own,
                waves,
                weights + gathering + dense + max(passing, head + wave * T * hidden),
                weights_host + gathering_host + masks,
            )
        )
    at_rest = (all_factors * share if stores.factors == "device" else 0) + dense
    at_rest_host = all_factors * share if stores.factors == "host" else 0
    kept = sum(n.kept_bytes for n in needs) * share
    moved_factors = _moved(stores.factors, all_factors * share)
    if needs and job.block_by_block:
        gathered = max(sum(4 * linear.num_columns**2 for linear in shapes.linears[block]) for block in own)
        moving = per_replica * T * hidden + T * forward_only + conversion
        tokens = per_replica * T * 2 * 2 * all_blocks / width
        update = weights + moving + gathered + max(n.update_bytes for n in needs)
        flops = share * sum(n.update_flops for n in needs)
        steps.append(StepPlan("update", update, weights_host + masks, tokens, flops, *_moved(stores.weights, 2 * all_blocks)))
    elif needs:
        costs = max(n.costs_bytes for n in needs)
        update = max(n.update_bytes for n in needs)
        steps.append(
            StepPlan(
                "costs",
                idle + at_rest + kept + costs,
                weights_host + at_rest_host + masks,
                0.0,
                share * sum(n.costs_flops for n in needs),
                *moved_factors,
            )
        )
        steps.append(
            StepPlan(
                "update",
                idle + at_rest + kept + update,
                weights_host + at_rest_host + masks,
                0.0,
                share * sum(n.update_flops for n in needs),
                *moved_factors,
            )
        )
    if job.lora_rank:
        adapters = 16 * job.lora_rank * sum(linear.num_rows + linear.num_columns for linear in linears)
        inputs = width * T * sum(linear.num_columns for linear in shapes.linears[own[0]])
        flops = 3 * 2 * all_blocks / width * job.num_correction_sequences * T
        loads = _moved(stores.weights, 2 * all_blocks * -(-job.num_correction_sequences // wave))
        steps.append(
            StepPlan(
                "correction",
                weights + adapters + max(passing, head) + inputs * (len(own) * in_flight if stores.activations == "keep" else 1),
                weights_host + masks,
                flops,
                0.0,
                *loads,
            )
        )
    written = max(min(_FILE_BYTES, all_blocks + outside), shapes.largest_tensor)
    steps.append(StepPlan("commit", idle, weights_host + masks + written, disk_bytes=all_blocks))
    disk = (all_factors if stores.factors == "disk" else 0) + (all_blocks if stores.weights == "disk" else 0)
    return WorkerPlan(shard, blocks.first, blocks.last - 1, tuple(steps), disk, _PROCESS_BYTES)


def _curvature(
    shapes: _Shapes, placement: Placement, job: Job, stores: Stores, blocks: BlockRange, own: range, waves: int, device: float, host: float
) -> StepPlan:
    tokens = -(-job.num_sequences // placement.num_replicas) * job.sequence_length
    block_bytes = sum(shapes.block_bytes[block] for block in own)
    passes = 1 if job.factors == "A" else 2 + (stores.activations == "recompute")
    products = passes * 2 * block_bytes / shapes.width
    head = 3 * 2 * shapes.layout.config.vocab_size * shapes.layout.config.hidden_size if blocks.is_last else 0
    factors = sum(shapes.factor_bytes[block] for block in own) / 4 * 2
    loads = (1 if job.factors == "A" else 2) * waves * block_bytes
    moved = [
        a + b
        for a, b in zip(
            _moved(stores.weights, loads), _moved(stores.factors, 2 * waves * sum(shapes.factor_bytes[b] for b in own)), strict=True
        )
    ]
    bubble = (waves + placement.num_shards - 1) / waves
    flops = job.num_passes * tokens * (products + head + factors)
    return StepPlan("curvature", device, host, flops, 0.0, job.num_passes * moved[0], job.num_passes * moved[1], bubble)


def _moved(where: Place, size: float) -> tuple[float, float]:
    """Return the bytes that move between host and device, and between disk and host."""
    return (0.0, 0.0) if where == "device" else (size, 0.0) if where == "host" else (size, size)


def _bytes_per_token(linears: Sequence[LinearShape], hidden: int, width: int) -> float:
    """Return what a block needs for a token, forward with gradients and back: outputs of its linears, norms in float32, gradients."""
    outputs = sum(linear.num_rows for linear in linears)
    widest = max(linear.num_columns for linear in linears)
    return width * (outputs + 4 * widest) + 10 * hidden / width * (4 + width) / 2


def _forward_bytes_per_token(linears: Sequence[LinearShape], hidden: int, width: int) -> float:
    """Return what a block needs for a token without gradients: its widest layer's outputs and inputs."""
    widest = max(linear.num_columns for linear in linears)
    return width * 3 * widest + 4 * hidden


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table: for every shard the peak of each step, and the expected time of each."""
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
    table.add_row("", f"{plan.device.name}", *(_time(seconds) for seconds in plan.seconds.values()), "", "")
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
