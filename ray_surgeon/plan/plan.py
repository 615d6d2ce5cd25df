"""What a job needs on every worker, and where workers keep things so that it fits.

All of it is arithmetic on shapes.

The plan is a function of the model's configuration, the job and the memory there is. It chooses the
fastest way that fits, or it says which step binds and what would do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from ray_surgeon.memory.stores import Activations, Place, Stores
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.devices import Device, Room
from ray_surgeon.plan.needs import PROCESS_BYTES, Shapes, StepPlan, Work, WorkerView
from ray_surgeon.runtime.placement import Placement, place
from ray_surgeon.spec.memory import MemorySection

_SAFE = 0.9
"""Of the memory there is, the fraction that is planned with."""


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's needs; replicas of a shard need the same."""

    shard: int
    first_block: int
    last_block: int  # inclusive
    steps: tuple[StepPlan, ...]
    disk: float  # bytes of scratch

    def peak(self, room: Room, step: StepPlan) -> tuple[float, float]:
        """Return the peak bytes of a step on the device and on the host.

        Where these are one, all bytes are the device's.
        """
        if room.device_is_host:
            return step.device + step.host + PROCESS_BYTES, 0.0
        return step.device, step.host + PROCESS_BYTES


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
        return {
            name: max(w.steps[i].seconds(self.device, self.dtype) for w in self.workers)
            for i, name in enumerate(names)
        }

    def peaks(self) -> dict[str, list[float]]:
        """Return the planned peak of every step on every shard's device.

        If the device is the host, the process's own memory is included.
        """
        return {
            step.name: [w.peak(self.room, w.steps[i])[0] for w in self.workers]
            for i, step in enumerate(self.workers[0].steps)
        }

    def as_record(self) -> dict[str, Any]:
        """Return what the report says of the plan.

        Operations and bytes are those of all shards of one replica.
        """
        steps = list(enumerate(self.workers[0].steps))
        return {
            "stores": asdict(self.stores),
            "device": self.device.name,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "flops": {
                step.name: sum(w.steps[i].flops + w.steps[i].float32_flops for w in self.workers)
                for i, step in steps
            },
            "moved_bytes": {
                step.name: sum(w.steps[i].host_bytes + w.steps[i].disk_bytes for w in self.workers)
                for i, step in steps
            },
            "peak_bytes": {
                name: [int(peak) for peak in of_shards] for name, of_shards in self.peaks().items()
            },
            "disk_bytes": [int(worker.disk) for worker in self.workers],
        }

    def excess(self) -> tuple[float, str]:
        """Return the largest part of a memory that would be needed, and a sentence on where.

        A part of at most 1 fits.
        """
        worst = (0.0, "")
        on_device = "memory" if self.room.device_is_host else "device memory"
        for worker in self.workers:
            for step in worker.steps:
                device, host = worker.peak(self.room, step)
                for what, need, available in (
                    (on_device, device, self.room.device),
                    ("host memory", host, self.room.host),
                ):
                    if need / available > worst[0]:
                        worst = (
                            need / available,
                            f"{step.name} on shard {worker.shard} needs {_gib(need)} of {what}, "
                            f"there are {_gib(available)}",
                        )
            if worker.disk / max(1.0, self.room.disk) > worst[0]:
                worst = (
                    worker.disk / max(1.0, self.room.disk),
                    f"shard {worker.shard} needs {_gib(worker.disk)} of disk, there are "
                    f"{_gib(self.room.disk)}",
                )
        return worst


class DoesNotFitError(ValueError):
    """No way to run the job fits the memory there is."""


def plan_job(
    layout: ModelLayout,
    placement: Placement,
    work: Work,
    wanted: MemorySection,
    room: Room,
    device: Device,
) -> Plan:
    """Choose the fastest way that fits.

    Args:
        layout: of the model.
        placement: of its blocks.
        work: what is done.
        wanted: what the spec fixes.
        room: of every worker.
        device: how fast it is.

    Raises:
        DoesNotFitError: nothing fits; names the step that binds, and what would do.
    """
    limit = math.inf if wanted.limit_gib is None else wanted.limit_gib * 2**30
    unlimited = replace(
        room, device=_SAFE * room.device, host=_SAFE * room.host, disk=_SAFE * room.disk
    )
    usable = replace(unlimited, device=min(limit, unlimited.device))
    shapes = Shapes(layout, work)
    plans = [
        _plan(shapes, placement, work, stores, usable, device)
        for stores in _ways(work, placement, wanted, room)
    ]
    fitting = [plan for plan in plans if plan.excess()[0] <= 1]
    if fitting:
        # the first of equals, which is the simplest
        return min(fitting, key=lambda plan: sum(plan.seconds.values()))
    best = min(plans, key=lambda plan: plan.excess()[0])
    raise DoesNotFitError(
        f"memory: the job does not fit: {best.excess()[1]} (with weights: {best.stores.weights}, "
        f"factors: {best.stores.factors}, wave: {best.stores.wave}); "
        f"{_remedy(shapes, placement, work, wanted, usable, unlimited, device, best)}"
    )


def _ways(work: Work, placement: Placement, wanted: MemorySection, room: Room) -> Iterator[Stores]:
    """Yield what the spec allows, the simplest first."""
    per_replica = -(-work.num_sequences // placement.num_replicas)
    waves = (
        [wanted.wave]
        if wanted.wave
        else [2**i for i in range(max(1, math.ceil(math.log2(per_replica)) + 1))]
    )
    places: tuple[Place, ...] = (
        ("device", "disk") if room.device_is_host else ("device", "host", "disk")
    )
    of_weights: Sequence[Place] = places if wanted.weights == "auto" else [wanted.weights]
    of_factors: Sequence[Place] = places if wanted.factors == "auto" else [wanted.factors]
    of_activations: Sequence[Activations] = (
        ("keep", "recompute") if wanted.activations == "auto" else [wanted.activations]
    )
    for weights, factors, activations in itertools.product(of_weights, of_factors, of_activations):
        resident = (weights, factors) == ("device", "device")
        if activations == "keep" and not resident:
            continue
        for wave in waves if not resident or wanted.wave else waves[:1]:
            yield Stores(weights, factors, activations, min(wave, per_replica))


def _remedy(
    shapes: Shapes,
    placement: Placement,
    work: Work,
    wanted: MemorySection,
    room: Room,
    unlimited: Room,
    device: Device,
    best: Plan,
) -> str:
    """Return the smallest change that would do; `unlimited` is without `memory.limit_gib`."""

    def fits(num_shards: int) -> bool:
        more_shards = place(shapes.layout, num_shards, placement.num_replicas)
        ways = (
            _plan(shapes, more_shards, work, stores, room, device)
            for stores in _ways(work, more_shards, wanted, room)
        )
        return any(plan.excess()[0] <= 1 for plan in ways)

    most = shapes.layout.num_blocks
    fewest = placement.num_shards
    remedies = []
    if fewest < most and fits(most):
        low = fewest
        high = most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        remedies.append(f"set cluster.num_shards: {high}, on as many such devices")
    free = wanted.model_copy(
        update={"weights": "auto", "factors": "auto", "activations": "auto", "wave": None}
    )
    if free != wanted:
        ways = (
            _plan(shapes, placement, work, stores, room, device)
            for stores in _ways(work, placement, free, room)
        )
        if any(plan.excess()[0] <= 1 for plan in ways):
            remedies.append("leave memory to the plan, which finds a way")
    times = best.excess()[0]
    if (
        wanted.limit_gib is not None
        and _plan(shapes, placement, work, best.stores, unlimited, device).excess()[0] <= 1
    ):
        remedies.append(
            f"or raise memory.limit_gib to {math.ceil(100 * wanted.limit_gib * times) / 100:g}"
        )
    else:
        remedies.append(
            f"or give workers with {times:.2g} times that memory"
            if times < 100
            else f"or give workers with {times:.0f} times it"
        )
    return ", ".join(remedies).removeprefix("or ")


def _plan(
    shapes: Shapes, placement: Placement, work: Work, stores: Stores, room: Room, device: Device
) -> Plan:
    workers = []
    for shard, blocks in enumerate(placement.blocks):
        worker = WorkerView(shapes, placement, work, stores, room.device_is_host, shard, blocks)
        workers.append(
            WorkerPlan(
                shard, blocks.first, blocks.last - 1, tuple(worker.steps()), worker.disk_bytes
            )
        )
    return Plan(stores, tuple(workers), placement.num_replicas, room, device, work.dtype)


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table.

    It has the peak of each step on every shard, operations, bytes that move and expected times.
    """
    stores = plan.stores
    steps = [step.name for step in plan.workers[0].steps]
    how = (
        f"weights: {stores.weights}, factors: {stores.factors}, activations: {stores.activations}, "
        f"wave: {stores.wave}"
    )
    table = Table(
        title=f"shards: {len(plan.workers)}, replicas: {plan.num_replicas}; {how}; GiB of a "
        "worker's device at the peak of each step"
    )
    for column in ("shard", "blocks", *steps, "host", "disk"):
        table.add_column(column, justify="right")
    for worker in plan.workers:
        peaks = [worker.peak(plan.room, step) for step in worker.steps]
        sizes = [*(device for device, _ in peaks), max(host for _, host in peaks), worker.disk]
        table.add_row(
            str(worker.shard),
            f"{worker.first_block}-{worker.last_block}",
            *(f"{size / 2**30:.2f}" for size in sizes),
        )
    table.add_section()
    record = plan.as_record()
    table.add_row(
        "all", "TFLOP", *(f"{flops / 1e12:.3g}" for flops in record["flops"].values()), "", ""
    )
    table.add_row(
        "all", "GB moved", *(f"{size / 1e9:.3g}" for size in record["moved_bytes"].values()), "", ""
    )
    table.add_row(
        "slowest", plan.device.name, *(_time(seconds) for seconds in plan.seconds.values()), "", ""
    )
    return table


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2g} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
