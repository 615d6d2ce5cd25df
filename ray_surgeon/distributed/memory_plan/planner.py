"""Needs of a job on every worker, and where workers keep tensors so that the job fits.

All of it is arithmetic on shapes: the plan is a function of the model's configuration, the job and
the available memory. It is the fastest way that fits; if there is none, the error names the step
that needs most, and the remedies.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast, get_args

from rich.table import Table

from ray_surgeon.config.sections import MemorySection
from ray_surgeon.distributed.memory_plan.device_resources import Device, Room
from ray_surgeon.distributed.memory_plan.planned_job import Shapes, StepPlan
from ray_surgeon.distributed.memory_plan.steps import WorkerPlan, plan_worker
from ray_surgeon.distributed.placement import Placement, place
from ray_surgeon.memory.stores import TOGETHER, Activations, Place, Stores

PROCESS_BYTES = (328 + 60) * 2**20
"""Anonymous memory of a worker beside its tensors.

The first part is there once the worker has imported all modules; the second is what the C library's
heap and oneDNN hold in addition once it has computed. Measured with torch 2.13 and Ray 2.60 on
Linux.
"""
_SAFE = 0.9
"""Fraction of the available memory that plans may use."""

_Choice = TypeVar("_Choice")


class _Need(NamedTuple):
    """Bytes needed of one memory by a step or a shard, and the bytes available there."""

    where: str
    memory: str
    needed: float
    available: float

    @property
    def fraction(self) -> float:
        return self.needed / self.available


@dataclass(frozen=True)
class Plan:
    """How a job runs."""

    stores: Stores
    shapes: Shapes  # of the model, with the job
    workers: tuple[WorkerPlan, ...]  # one per shard; replicas of a shard need the same
    room: Room
    device: Device

    @property
    def steps(self) -> dict[str, tuple[StepPlan, ...]]:
        """Each step on all shards, by name."""
        steps = {}
        for shards in zip(*(worker.steps for worker in self.workers), strict=True):
            steps[shards[0].name] = shards
        return steps

    @property
    def seconds(self) -> dict[str, float]:
        """Lower bound on the time of each step on the slowest worker, by name.

        See `StepPlan.seconds`.
        """
        dtype = self.shapes.job.dtype
        seconds = {}
        for name, shards in self.steps.items():
            seconds[name] = max(step.seconds(self.device, dtype) for step in shards)
        return seconds

    @property
    def num_replicas(self) -> int:
        """Replicas of each shard."""
        return self.workers[0].view.num_replicas

    @property
    def worker_hours(self) -> float:
        """Lower bound on the hours of all workers together, with one shot."""
        num_workers = len(self.workers) * self.num_replicas
        return num_workers * sum(self.seconds.values()) / 3600

    @property
    def places(self) -> dict[str, Any]:
        """The stores of the plan, by name."""
        places = asdict(self.stores)
        if not self.shapes.job.has_teacher:
            del places["teacher"]
        return places

    def peak(self, step: StepPlan) -> tuple[float, float]:
        """Return the peak bytes of a step on the device and on the host.

        If both have one memory, all bytes count as the device's.
        """
        if self.room.device_is_host:
            return step.device + step.host + PROCESS_BYTES, 0.0
        return step.device, step.host + PROCESS_BYTES

    def peaks(self) -> dict[str, list[float]]:
        """Return the planned peak of every step on every shard's device, in bytes.

        If the device is the host, the process's own memory is included.
        """
        peaks = {}
        for name, shards in self.steps.items():
            peaks[name] = [self.peak(step)[0] for step in shards]
        return peaks

    def as_record(self) -> dict[str, Any]:
        """Return the plan's entry in the report.

        Operations and bytes are summed over all shards of one replica. Seconds and hours are lower
        bounds; see `StepPlan.seconds`.
        """
        flops = {}
        moved_bytes = {}
        memory_bytes = {}
        for name, shards in self.steps.items():
            flops[name] = sum(step.flops + step.float32_flops for step in shards)
            moved_bytes[name] = sum(step.host_bytes + step.disk_bytes for step in shards)
            memory_bytes[name] = round(sum(step.memory_bytes for step in shards))
        return {
            "stores": self.places,
            "device": self.device.name,
            "worker_hours": self.worker_hours,
            "seconds": {
                name: round(seconds, 3) for name, seconds in self.seconds.items()
            },
            "flops": flops,
            "moved_bytes": moved_bytes,
            "memory_bytes": memory_bytes,
            "peak_bytes": {
                name: list(map(int, peaks)) for name, peaks in self.peaks().items()
            },
            "disk_bytes": [int(worker.view.disk_bytes) for worker in self.workers],
        }

    def excess(self) -> tuple[float, str]:
        """Return the largest needed fraction of a memory, and a sentence that says where.

        A fraction of at most 1 fits.
        """
        room = self.room
        device_memory = "memory" if room.device_is_host else "device memory"
        needs = []
        for worker in self.workers:
            shard = f"shard {worker.view.shard}"
            for step in worker.steps:
                device, host = self.peak(step)
                where = f"{step.name} on {shard}"
                needs.append(_Need(where, device_memory, device, room.device))
                needs.append(_Need(where, "host memory", host, room.host))
            needs.append(
                _Need(shard, "disk", worker.view.disk_bytes, max(1.0, room.disk))
            )
        largest = max(needs, key=lambda need: need.fraction)
        sentence = (
            f"{largest.where} needs {largest.needed / 2**30:.1f} GiB of {largest.memory}, "
            f"there are {largest.available / 2**30:.1f} GiB"
        )
        return largest.fraction, sentence

    @property
    def fits(self) -> bool:
        """Whether the available memory suffices."""
        return self.excess()[0] <= 1


class DoesNotFitError(ValueError):
    """No way to run the job fits the available memory."""


@dataclass(frozen=True)
class Planner:
    """Makes plans of one job, for any placement and room."""

    shapes: Shapes  # of the model, with the job
    wanted: MemorySection  # the settings that the spec fixes
    device: Device  # speed of a worker's device

    def best(self, placement: Placement, room: Room) -> Plan:
        """Choose the fastest plan that fits.

        Args:
            placement: of the job.
            room: bytes that each worker may use.

        Raises:
            DoesNotFitError: nothing fits; names the step that needs most, and the remedies.
        """
        safe = replace(
            room,
            device=_SAFE * room.device,
            host=_SAFE * room.host,
            disk=_SAFE * room.disk,
        )
        limit = 2**30 * (self.wanted.limit_gib or math.inf)
        limited = replace(safe, device=min(limit, safe.device))
        plans = list(self.plans(placement, limited))
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            # the first of equals, which is the simplest
            return min(fitting, key=lambda plan: sum(plan.seconds.values()))
        best = min(plans, key=lambda plan: plan.excess()[0])
        shown = []
        for name, kept_in in best.places.items():
            if name in ("weights", "factors", "teacher", "wave"):
                shown.append(f"{name}: {kept_in}")
        raise DoesNotFitError(
            f"memory: the job does not fit: {best.excess()[1]} (with {', '.join(shown)}); "
            f"{self.remedy(placement, safe, best)}"
        )

    def plan(self, placement: Placement, room: Room, stores: Stores) -> Plan:
        """Return the plan of the job with given stores."""
        workers = []
        for shard in range(placement.num_shards):
            worker = plan_worker(
                shapes=self.shapes,
                placement=placement,
                stores=stores,
                device_is_host=room.device_is_host,
                shard=shard,
            )
            workers.append(worker)
        return Plan(
            stores=stores,
            shapes=self.shapes,
            workers=tuple(workers),
            room=room,
            device=self.device,
        )

    def plans(self, placement: Placement, room: Room) -> Iterator[Plan]:
        """Yield the plans that the spec allows, the simplest first."""
        per_replica = -(-self.shapes.job.num_sequences // placement.num_replicas)
        for weights, factors, activations, teacher in self._ways(room.device_is_host):
            is_resident = weights == factors == "device"
            if activations == "keep" and not is_resident:
                continue
            for wave, together in self._waves(
                per_replica, is_resident, room.device_is_host
            ):
                stores = Stores(
                    weights=weights,
                    factors=factors,
                    activations=activations,
                    wave=wave,
                    together=together,
                    teacher=teacher,
                )
                plan = self.plan(placement, room, stores)
                while not plan.fits and stores.together > 1:
                    stores = replace(stores, together=stores.together // 2)
                    plan = self.plan(placement, room, stores)
                yield plan

    def _ways(
        self, device_is_host: bool
    ) -> Iterator[tuple[Place, Place, Activations, Place]]:
        """Return places of weights and factors, ways of activations, and places of the teacher."""
        wanted = self.wanted
        job = self.shapes.job
        places: tuple[Place, ...] = get_args(Place)
        if device_is_host:
            places = ("device", "disk")
        only_device: tuple[Place, ...] = ("device",)
        weights = only_device if job.trains_all else _choices(wanted.weights, places)
        teacher = _choices(wanted.teacher, places) if job.has_teacher else only_device
        factors = _choices(wanted.factors, places)
        all_activations: tuple[Activations, ...] = get_args(Activations)
        activations = _choices(wanted.activations, all_activations)
        return itertools.product(weights, factors, activations, teacher)

    def _waves(
        self, per_replica: int, is_resident: bool, device_is_host: bool
    ) -> Iterator[tuple[int, int]]:
        """Yield the sequences of a wave, and the largest number of them in one call.

        On a GPU more are better: a call reads the weights once, and launches the same number of
        kernels, for any number of sequences. On a CPU a single sequence stays in the cache.
        """
        if self.wanted.wave:
            waves = [self.wanted.wave]
        else:
            num_waves = max(1, math.ceil(math.log2(per_replica)) + 1)
            waves = [2**i for i in range(num_waves)]
        most = 1 if device_is_host else TOGETHER
        if is_resident:
            in_one_call = [wave for wave in reversed(waves) if wave <= most]
            waves = in_one_call or waves[:1]
        for wave in waves:
            size = min(wave, per_replica)
            yield size, min(size, most)

    def remedy(self, placement: Placement, safe: Room, best: Plan) -> str:
        """Return the smallest changes that would make the job fit.

        Args:
            placement: of the job.
            safe: the room without `memory.limit_gib`.
            best: the plan that exceeds its room least.
        """
        wanted = self.wanted
        remedies = []
        num_shards = self._enough_shards(placement, best.room)
        if num_shards is not None:
            remedies.append(
                f"set cluster.num_shards: {num_shards}, on as many such devices"
            )
        free = MemorySection(limit_gib=wanted.limit_gib, scratch=wanted.scratch)
        freed = replace(self, wanted=free)
        if free != wanted and any(
            plan.fits for plan in freed.plans(placement, best.room)
        ):
            remedies.append("leave memory to the plan, which finds a way")
        if self.shapes.job.trains_all:
            remedies.append(
                "or give recovery.rank a number, with which weights may be elsewhere"
            )
        times = best.excess()[0]
        if wanted.limit_gib is not None and self.plan(placement, safe, best.stores).fits:
            limit = math.ceil(100 * wanted.limit_gib * times) / 100
            remedies.append(f"or raise memory.limit_gib to {limit:g}")
        else:
            rounded = float(f"{times:.2g}")
            remedies.append(f"or give workers with {rounded:g} times that memory")
        return ", ".join(remedies).removeprefix("or ")

    def _enough_shards(self, placement: Placement, room: Room) -> int | None:
        """Return the smallest larger number of shards with which the job fits, if there is one."""

        def fits(num_shards: int) -> bool:
            placed = place(self.shapes.layout, num_shards, placement.num_replicas)
            return any(plan.fits for plan in self.plans(placed, room))

        more = range(placement.num_shards + 1, self.shapes.layout.num_blocks + 1)
        if not more or not fits(more[-1]):
            return None
        return more[bisect.bisect_left(more[:-1], True, key=fits)]


def _choices(wanted: _Choice | str, choices: tuple[_Choice, ...]) -> tuple[_Choice, ...]:
    """Return the choices that a setting leaves: all of them if it is "auto"."""
    if wanted == "auto":
        return choices
    return (cast(_Choice, wanted),)


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table.

    It has the peak of each step on every shard, operations, moved bytes, and lower bounds on times.
    """
    record = plan.as_record()
    stores = ", ".join(f"{name}: {value}" for name, value in record["stores"].items())
    hours = "GPU-hours" if plan.device.memory_bytes else "worker-hours"
    table = Table(
        title=(
            f"shards: {len(plan.workers)}, replicas: {plan.num_replicas}; {stores}; "
            "GiB of a worker's device at the peak of each step"
        ),
        caption=f"at least {plan.worker_hours:.3g} {hours}, with one pruning round",
    )
    for column in ("shard", "blocks", *plan.seconds, "host", "disk"):
        table.add_column(column, justify="right")
    for worker in plan.workers:
        on_device = []
        on_host = []
        for step in worker.steps:
            device, host = plan.peak(step)
            on_device.append(device)
            on_host.append(host)
        sizes = [*on_device, max(on_host), worker.view.disk_bytes]
        blocks = f"{worker.view.blocks.first}-{worker.view.blocks.last - 1}"
        table.add_row(
            str(worker.view.shard), blocks, *(f"{size / 2**30:.2f}" for size in sizes)
        )
    table.add_section()
    for name in ("flops", "moved_bytes", "memory_bytes"):
        table.add_row(
            "all", name, *(f"{value:.3g}" for value in record[name].values()), "", ""
        )
    table.add_row("slowest", plan.device.name, *map(_time, plan.seconds.values()), "", "")
    return table


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
