"""What `plan` says of a job: time and peak memory in a few lines, and all steps if asked."""

from __future__ import annotations

from ray_surgeon.config.job import JobSpec
from ray_surgeon.distributed.memory_plan.planner import Plan
from ray_surgeon.preparation.resolve import seconds_of_run
from ray_surgeon.report.wording import counted, duration, parts_of

_GIB = 2**30


def plan_lines(spec: JobSpec, plan: Plan) -> list[str]:
    """Return the expected time, the peak memory, and where workers keep tensors.

    Layers that are not pruned because they are in place of an attention are named, too.

    Args:
        spec: of the job.
        plan: for it.
    """
    lines = [_time_line(spec, plan), _memory_line(plan), _places_line(plan)]
    layout = plan.shapes.layout
    for mixer, blocks in layout.left_whole.items():
        num_blocks = counted(layout.num_blocks, "block")
        lines.append(f"not pruned: {mixer}, in {len(blocks)} of {num_blocks}")
    return lines


def _time_line(spec: JobSpec, plan: Plan) -> str:
    seconds = seconds_of_run(spec, plan)
    total = sum(seconds.values())
    num_workers = len(plan.workers) * plan.num_replicas
    kind = "GPU-hours" if plan.device.memory_bytes else "worker-hours"
    longest = max(seconds, key=lambda name: seconds[name])
    rounds = counted(spec.schedule.shots, "pruning round") if spec.pruning else ""
    about = parts_of(
        rounds,
        f"{counted(num_workers, 'worker')} on {plan.device.name}",
        f"{num_workers * total / 3600:.2g} {kind}",
    )
    return (
        f"time: at least {duration(total)} ({about}), longest: {longest}, "
        f"{duration(seconds[longest])}"
    )


def _memory_line(plan: Plan) -> str:
    largest = 0.0
    where = ""
    host_bytes = 0.0
    disk_bytes = 0.0
    for worker in plan.workers:
        disk_bytes = max(disk_bytes, worker.view.disk_bytes)
        for step in worker.steps:
            device, host = plan.peak(step)
            host_bytes = max(host_bytes, host)
            if device > largest:
                largest = device
                where = step.name
    whose = "memory" if plan.room.device_is_host else "device memory"
    on_host = f"{host_bytes / _GIB:.1f} GiB of host memory" if host_bytes else ""
    on_disk = f"{disk_bytes / _GIB:.1f} GiB of disk" if disk_bytes else ""
    peak = f"{largest / _GIB:.1f} GiB of {whose} (in {where})"
    return f"peak of a worker: {parts_of(peak, on_host, on_disk)}"


def _places_line(plan: Plan) -> str:
    places = []
    for tensors in ("weights", "factors", "teacher"):
        if tensors in plan.places:
            places.append(f"{tensors} on the {plan.places[tensors]}")
    return (
        f"{counted(len(plan.workers), 'shard')}, {counted(plan.num_replicas, 'replica')}; "
        f"{parts_of(*places)}; --verbose shows every step"
    )
