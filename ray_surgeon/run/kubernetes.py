"""The RayJob of KubeRay for one job: one pod for each worker, sized by the plan."""

from __future__ import annotations

import math
from typing import NamedTuple

from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed.memory_plan.planner import Plan
from ray_surgeon.errors import ConfigError
from ray_surgeon.preparation.inputs import Inputs
from ray_surgeon.report.html_report import rendered

_GIB = 2**30
_SPARE = 1.25
"""Memory and disk of a pod relative to the plan's needs."""
_TIMES = 4
"""Factor on the expected time, after which a try is ended."""
_DETECTED = "ray.io/accelerator-type"
"""The label that Ray sets by itself."""
_OF_RAY_GIB = 2
"""Memory of a raylet and its agents, without workers."""


class Pod(NamedTuple):
    """Resources of a pod: CPUs, GPUs, and GiB."""

    cpus: int
    gpus: int
    memory: int  # including its share of /dev/shm
    store: int  # of /dev/shm, for Ray's objects
    cache: int  # of /cache: downloads, weights on disk, exports that are checked


HEAD = Pod(cpus=4, gpus=0, memory=16, store=2, cache=100)
WORKER = Pod(cpus=5, gpus=0, memory=24, store=4, cache=100)
"""Pods of a cluster for several jobs."""


def ray_cluster() -> str:
    """Return the YAML of a permanent cluster."""
    return rendered(
        "rayjob.yaml.jinja",
        kind="RayCluster",
        name="ray-surgeon",
        head=HEAD,
        worker=WORKER,
        num_workers=8,
        labels={},
    )


def ray_job(inputs: Inputs, plan: Plan) -> str:
    """Return the YAML of a RayJob.

    Args:
        inputs: checked.
        plan: of the job, with one worker in each pod.

    Raises:
        ValueError: the workers are not actors of Ray.
    """
    section = inputs.spec.cluster
    if not isinstance(section, RaySection):
        raise ConfigError(
            field="cluster.backend",
            found="local has no pods for workers",
            remedy="remove it for Kubernetes",
        )
    dense_bytes = inputs.layout.num_parameters * plan.shapes.width
    waits_s = math.ceil(section.start_timeout_s)
    expected_s = sum(plan.seconds.values()) * inputs.spec.schedule.shots
    labels = {}
    for key, value in section.worker_labels.items():
        is_plain = value[0] != "!" and "(" not in value
        if is_plain and key != _DETECTED:
            labels[key] = value
    return rendered(
        "rayjob.yaml.jinja",
        kind="RayJob",
        name="ray-surgeon",
        head=_head(dense_bytes),
        worker=_worker(inputs, plan, dense_bytes),
        num_workers=section.num_workers,
        waits_s=waits_s,
        times=_TIMES,
        deadline_s=waits_s + 600 * math.ceil(_TIMES * expected_s / 600),
        labels=labels,
    )


def _head(dense_bytes: float) -> Pod:
    """Return the pod of the head, which loads each export whole and downloads it once more."""
    memory = HEAD.store + _OF_RAY_GIB + _gib(1.5 * dense_bytes)
    cache = 10 + _gib(3 * dense_bytes)
    return HEAD._replace(memory=max(HEAD.memory, memory), cache=cache)


def _worker(inputs: Inputs, plan: Plan, dense_bytes: float) -> Pod:
    """Return the pod of a worker, for the plan's needs, Ray, and messages."""
    section = inputs.spec.cluster
    shapes = plan.shapes
    sequences = max(plan.stores.wave, plan.stores.together) * shapes.job.sequence_length
    hidden_bytes = inputs.layout.config.hidden_size * shapes.width
    # for a wave, in both directions, some of them at once
    store = max(1, _gib(8 * sequences * hidden_bytes))
    host = 0.0
    disk = 0.0
    for worker in plan.workers:
        disk = max(disk, worker.view.disk_bytes)
        for step in worker.steps:
            on_device, on_host = plan.peak(step)
            host = max(host, on_host or on_device)
    return Pod(
        cpus=section.cpus_per_worker + 1,
        gpus=section.gpus_per_worker,
        memory=store + _OF_RAY_GIB + _gib(host),
        store=store,
        cache=10 + _gib(disk + dense_bytes),
    )


def _gib(size_bytes: float) -> int:
    return math.ceil(_SPARE * size_bytes / _GIB)
