"""What a job needs on every worker, and where workers keep things so that it fits.

All of it is arithmetic on shapes.

The plan is a function of the model's configuration, the job and the memory there is. It chooses the
fastest way that fits, or it says which step binds and what would do.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from rich.table import Table

from ray_surgeon.memory.stores import TOGETHER, Activations, Place, Stores
from ray_surgeon.plan.counts import StepPlan
from ray_surgeon.plan.device_resources import Device, Room
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.plan.work import Shapes
from ray_surgeon.runtime.placement import Placement, place
from ray_surgeon.spec.sections import MemorySection

PROCESS_BYTES = (328 + 60) * 2**20
"""Anonymous memory of a worker beside its tensors.

The first part is there once it has imported everything; the second is what the C library's heap and
oneDNN hold more once it has computed. Measured with torch 2.13 and Ray 2.60 on Linux.
"""
_SAFE = 0.9
"""Of the memory there is, the fraction that is planned with."""


@dataclass(frozen=True)
class Plan:
    """How a job runs."""

    stores: Stores
    workers: tuple[WorkerView, ...]  # one a shard; replicas of a shard need the same
    room: Room
    device: Device

    @property
    def steps(self) -> dict[str, tuple[StepPlan, ...]]:
        """Every step on each shard, by name."""
        steps = zip(*(worker.steps for worker in self.workers), strict=True)
        return {shards[0].name: shards for shards in steps}

    @property
    def seconds(self) -> dict[str, float]:
        """Expected time of every step: that of the slowest worker."""
        dtype = self.workers[0].shapes.work.dtype
        steps = self.steps.items()
        return {n: max(s.seconds(self.device, dtype) for s in shards) for n, shards in steps}

    @property
    def worker_hours(self) -> float:
        """Expected hours of all workers, for which all of them are held; with one shot."""
        num_workers = len(self.workers) * self.workers[0].num_replicas
        return num_workers * sum(self.seconds.values()) / 3600

    @property
    def places(self) -> dict[str, Any]:
        """Where things are, by name."""
        places = asdict(self.stores)
        if not self.workers[0].shapes.work.has_teacher:
            del places["teacher"]
        return places

    def peak(self, step: StepPlan) -> tuple[float, float]:
        """Return the peak bytes of a step on the device and on the host.

        Where these are one, all bytes are the device's.
        """
        if self.room.device_is_host:
            return step.device + step.host + PROCESS_BYTES, 0.0
        return step.device, step.host + PROCESS_BYTES

    def peaks(self) -> dict[str, list[float]]:
        """Return the planned peak of every step on every shard's device.

        If the device is the host, the process's own memory is included.
        """
        return {n: [self.peak(step)[0] for step in shards] for n, shards in self.steps.items()}

    def as_record(self) -> dict[str, Any]:
        """Return what the report says of the plan.

        Operations and bytes are those of all shards of one replica.
        """
        steps = self.steps.items()
        moved = {n: sum(s.host_bytes + s.disk_bytes for s in shards) for n, shards in steps}

        def counted(what: str) -> dict[str, int]:
            sums = {n: sum(getattr(s.counts, what) for s in shards) for n, shards in steps}
            return {name: round(number) for name, number in sums.items()}

        return {
            "stores": self.places,
            "device": self.device.name,
            "worker_hours": self.worker_hours,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "flops": {n: sum(s.flops + s.float32_flops for s in shards) for n, shards in steps},
            "moved_bytes": moved,
            **{of_step: counted(of_step) for of_step in ("launches", "syncs", "memory_bytes")},
            "peak_bytes": {name: list(map(int, peaks)) for name, peaks in self.peaks().items()},
            "disk_bytes": [int(worker.disk_bytes) for worker in self.workers],
        }

    def excess(self) -> tuple[float, str]:
        """Return the largest part of a memory that would be needed, and a sentence on where.

        A part of at most 1 fits.
        """
        room = self.room
        on_device = "memory" if room.device_is_host else "device memory"
        needs: list[tuple[str, float, str, float]] = []
        for worker in self.workers:
            for step in worker.steps:
                device, host = self.peak(step)
                where = f"{step.name} on shard {worker.shard}"
                needs.append((where, device, on_device, room.device))
                needs.append((where, host, "host memory", room.host))
            needs.append((f"shard {worker.shard}", worker.disk_bytes, "disk", max(1.0, room.disk)))
        where, need, what, available = max(needs, key=lambda row: row[1] / row[3])
        has = f"there are {available / 2**30:.1f} GiB"
        return need / available, f"{where} needs {need / 2**30:.1f} GiB of {what}, {has}"

    @property
    def fits(self) -> bool:
        """Whether the memory that there is suffices."""
        return self.excess()[0] <= 1


class DoesNotFitError(ValueError):
    """No way to run the job fits the memory there is."""


@dataclass(frozen=True)
class Planner:
    """Makes plans of one job, for any placement and room."""

    shapes: Shapes  # of the model, and what is done
    wanted: MemorySection  # what the spec fixes
    device: Device  # how fast a worker's is

    def best(self, placement: Placement, room: Room) -> Plan:
        """Choose the fastest way that fits; `room` is of every worker.

        Raises:
            DoesNotFitError: nothing fits; names the step that binds, and what would do.
        """
        sizes = {name: _SAFE * getattr(room, name) for name in ("device", "host", "disk")}
        safe = replace(room, **sizes)
        limit = 2**30 * (self.wanted.limit_gib or math.inf)
        plans = list(self.plans(placement, replace(safe, device=min(limit, safe.device))))
        if fitting := [plan for plan in plans if plan.fits]:
            # the first of equals, which is the simplest
            return min(fitting, key=lambda plan: sum(plan.seconds.values()))
        best = min(plans, key=lambda plan: plan.excess()[0])
        chosen = ("weights", "factors", "teacher", "wave")
        ways = ", ".join(f"{n}: {place}" for n, place in best.places.items() if n in chosen)
        problem = f"memory: the job does not fit: {best.excess()[1]} (with {ways})"
        raise DoesNotFitError(f"{problem}; {self.remedy(placement, safe, best)}")

    def plan(self, placement: Placement, room: Room, stores: Stores) -> Plan:
        """Return how the job runs if things are kept in these stores."""
        job = self.shapes, placement, stores, room.device_is_host
        workers = tuple(WorkerView(*job, shard) for shard in range(placement.num_shards))
        return Plan(stores, workers, room, self.device)

    def plans(self, placement: Placement, room: Room) -> Iterator[Plan]:
        """Yield what the spec allows, the simplest first."""
        wanted = self.wanted
        work = self.shapes.work
        per_replica = -(-work.num_sequences // placement.num_replicas)
        places = ("device", "disk") if room.device_is_host else get_args(Place)
        of_weights = places if wanted.weights == "auto" else [wanted.weights]
        of_teacher = places if wanted.teacher == "auto" else [wanted.teacher]
        for weights, factors, activations, teacher in itertools.product(
            ["device"] if work.streaming_remedy else of_weights,
            places if wanted.factors == "auto" else [wanted.factors],
            get_args(Activations) if wanted.activations == "auto" else [wanted.activations],
            of_teacher if work.has_teacher else ["device"],
        ):
            is_resident = weights == factors == "device"
            if activations == "keep" and not is_resident:
                continue
            for wave, together in self._waves(per_replica, is_resident, room.device_is_host):
                stores = Stores(weights, factors, activations, wave, together, teacher)
                plan = self.plan(placement, room, stores)
                while not plan.fits and stores.together > 1:
                    stores = replace(stores, together=stores.together // 2)
                    plan = self.plan(placement, room, stores)
                yield plan

    def _waves(
        self, per_replica: int, is_resident: bool, device_is_host: bool
    ) -> Iterator[tuple[int, int]]:
        """Yield how many sequences may pass in a wave, and of these at most in one call.

        On a GPU the more the better: a call launches as many kernels whatever their number. On a
        CPU one after the other stays in its cache.
        """
        num_waves = max(1, math.ceil(math.log2(per_replica)) + 1)
        waves = [self.wanted.wave] if self.wanted.wave else [2**i for i in range(num_waves)]
        most = 1 if device_is_host else TOGETHER
        if is_resident:
            waves = [wave for wave in reversed(waves) if wave <= most] or waves[:1]
        for wave in (min(wave, per_replica) for wave in waves):
            yield wave, min(wave, most)

    def remedy(self, placement: Placement, safe: Room, best: Plan) -> str:
        """Return the smallest change that would do; `safe` is without `memory.limit_gib`."""
        wanted = self.wanted
        remedies = []
        if (number := self._enough_shards(placement, best.room)) is not None:
            remedies.append(f"set cluster.num_shards: {number}, on as many such devices")
        free = MemorySection(limit_gib=wanted.limit_gib, scratch=wanted.scratch)
        freed = replace(self, wanted=free)
        if free != wanted and any(plan.fits for plan in freed.plans(placement, best.room)):
            remedies.append("leave memory to the plan, which finds a way")
        if self.shapes.work.streaming_remedy:
            remedies.append(self.shapes.work.streaming_remedy)
        times = best.excess()[0]
        if wanted.limit_gib is not None and self.plan(placement, safe, best.stores).fits:
            limit = math.ceil(100 * wanted.limit_gib * times) / 100
            remedies.append(f"or raise memory.limit_gib to {limit:g}")
        else:
            rounded = float(f"{times:.2g}")
            remedies.append(f"or give workers with {rounded:g} times that memory")
        return ", ".join(remedies).removeprefix("or ")

    def _enough_shards(self, placement: Placement, room: Room) -> int | None:
        """Return the smallest number of shards above the placement's with which the job fits."""

        def fits(num_shards: int) -> bool:
            placed = place(self.shapes.layout, num_shards, placement.num_replicas)
            return any(plan.fits for plan in self.plans(placed, room))

        more = range(placement.num_shards + 1, self.shapes.layout.num_blocks + 1)
        if not more or not fits(more[-1]):
            return None
        return more[bisect.bisect_left(more[:-1], True, key=fits)]


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table.

    It has the peak of each step on every shard, operations, bytes that move and expected times.
    """
    record = plan.as_record()
    stores = ", ".join(f"{name}: {value}" for name, value in record["stores"].items())
    workers = f"shards: {len(plan.workers)}, replicas: {plan.workers[0].num_replicas}"
    what = "GiB of a worker's device at the peak of each step"
    hours = "GPU-hours" if plan.device.memory_bytes else "worker-hours"
    spent = f"{plan.worker_hours:.3g} {hours}, with one shot"
    table = Table(title=f"{workers}; {stores}; {what}", caption=spent)
    for column in ("shard", "blocks", *plan.seconds, "host", "disk"):
        table.add_column(column, justify="right")
    for worker in plan.workers:
        peaks = [plan.peak(step) for step in worker.steps]
        on_host = max(host for _, host in peaks)
        sizes = [*(device for device, _ in peaks), on_host, worker.disk_bytes]
        blocks = f"{worker.blocks.first}-{worker.blocks.last - 1}"
        table.add_row(str(worker.shard), blocks, *(f"{size / 2**30:.2f}" for size in sizes))
    table.add_section()
    for name in ("flops", "moved_bytes", "memory_bytes", "launches", "syncs"):
        table.add_row("all", name, *(f"{value:.3g}" for value in record[name].values()), "", "")
    table.add_row("slowest", plan.device.name, *map(_time, plan.seconds.values()), "", "")
    return table


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
