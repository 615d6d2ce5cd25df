"""The RayJob of KubeRay for exactly one job: as many pods as workers, as large as the plan says."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ray_surgeon.plan.plan import Plan
from ray_surgeon.preparation.inputs import Inputs
from ray_surgeon.report.html_report import rendered
from ray_surgeon.spec.sections import RaySection

_GIB = 2**30
_SPARE = 1.25
"""Memory and disk of a pod, times what the plan needs."""
_TIMES = 4
"""A try that takes this many times the expected time is ended."""
_DETECTED = "ray.io/accelerator-type"
"""The label that Ray finds by itself."""
_OF_RAY_GIB = 2
"""What a raylet and its agents take beside workers."""


class Pod(NamedTuple):
    """What a pod gets: CPUs, GPUs, and GiB."""

    cpus: int
    gpus: int
    memory: int  # with its share of /dev/shm
    store: int  # of /dev/shm, for Ray's objects
    cache: int  # of /cache: downloads, what is kept on disk, exports that are checked


HEAD = Pod(4, 0, 16, 2, 100)
WORKER = Pod(5, 0, 24, 4, 100)
"""Of a cluster for several jobs."""


def ray_cluster() -> str:
    """Return the YAML of a cluster that stays."""
    sizes = {"head": HEAD, "worker": WORKER, "num_workers": 8, "labels": {}}
    return rendered("rayjob.yaml.jinja", kind="RayCluster", name="ray-surgeon", **sizes)


def ray_job(inputs: Inputs, plan: Plan) -> str:
    """Return the YAML of a RayJob.

    Args:
        inputs: checked.
        plan: of the job, on one worker a pod.

    Raises:
        ValueError: the workers are no actors of Ray.
    """
    section = inputs.spec.cluster
    if not isinstance(section, RaySection):
        raise ValueError("cluster.backend: local has no pods for workers; remove it for Kubernetes")
    dense = inputs.layout.num_parameters * plan.shapes.width
    about: dict[str, Any] = {"head": _head(dense), "worker": _worker(inputs, plan, dense)}
    waits_s = math.ceil(section.start_timeout_s)
    expected_s = sum(plan.seconds.values()) * inputs.spec.schedule.shots
    labels = section.worker_labels
    about |= {"num_workers": section.num_workers, "waits_s": waits_s, "times": _TIMES}
    about |= {"deadline_s": waits_s + 600 * math.ceil(_TIMES * expected_s / 600)}
    plain = {key: x for key, x in labels.items() if x[0] != "!" and "(" not in x}
    about["labels"] = {key: x for key, x in plain.items() if key != _DETECTED}
    return rendered("rayjob.yaml.jinja", kind="RayJob", name="ray-surgeon", **about)


def _head(dense: float) -> Pod:
    """Return the head: it reloads an export whole, and fetches each once more."""
    memory = HEAD.store + _OF_RAY_GIB + _gib(1.5 * dense)
    return HEAD._replace(memory=max(HEAD.memory, memory), cache=10 + _gib(3 * dense))


def _worker(inputs: Inputs, plan: Plan, dense: float) -> Pod:
    """Return the pod of a worker: what the plan needs there, Ray, and what travels."""
    section = inputs.spec.cluster
    shapes = plan.shapes
    sequences = max(plan.stores.wave, plan.stores.together) * shapes.job.sequence_length
    hidden = inputs.layout.config.hidden_size * shapes.width
    store = max(1, _gib(8 * sequences * hidden))  # of a wave, in both directions, some at once
    peaks = [plan.peak(step) for worker in plan.workers for step in worker.steps]
    host = max(on_host or on_device for on_device, on_host in peaks)
    disk = max(worker.view.disk_bytes for worker in plan.workers)
    memory = store + _OF_RAY_GIB + _gib(host)
    cache = 10 + _gib(disk + dense)
    return Pod(section.cpus_per_worker + 1, section.gpus_per_worker, memory, store, cache)


def _gib(size: float) -> int:
    return math.ceil(_SPARE * size / _GIB)
