"""Lists the machines of a Ray cluster, and reserves room for workers on them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
import ray._private.state as private
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)

from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed.cluster import NoRoomError
from ray_surgeon.distributed.processes import versions

Say = Callable[[str], None]
"""Takes a line of text for the user."""
_FIRST_S = 8.0
"""Time after which a run that waits for room reports what is lacking."""
_AGAIN_S = 60.0
"""Time between later reports."""


def nodes_alive() -> set[str]:
    """Return the identities of the machines that are alive in the cluster."""
    return {node["NodeID"] for node in _nodes() if node["Alive"]}


def nodes_preempted() -> set[str]:
    """Return the identities of machines that were lost after Ray had announced their preemption."""
    taken = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    return {node["NodeID"] for node in _nodes() if node["DeathReason"] == taken}


def nodes_leaving() -> set[str]:
    """Return the identities of live machines that will be preempted; Ray places nothing there."""
    # Ray Train calls this as well; there is no public function
    return set(private.state.get_draining_nodes())


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def reserve(num_workers: int, section: RaySection, say: Say) -> PlacementGroup:
    """Reserve room for all workers together, one bundle per worker.

    Args:
        num_workers: number of workers.
        section: resources and labels of each worker, and the time to wait for room.
        say: is told what the run waits for.

    Raises:
        NoRoomError: there is no room within the time; names the wanted and the free resources.
    """
    bundle: dict[str, float] = {}
    if section.cpus_per_worker:
        bundle["CPU"] = section.cpus_per_worker
    if section.gpus_per_worker:
        bundle["GPU"] = section.gpus_per_worker
    labels = dict(section.worker_labels)
    options: dict[str, Any] = {}
    if labels:
        options["bundle_label_selector"] = [labels] * num_workers
    group: PlacementGroup = placement_group(
        [bundle] * num_workers, strategy="PACK", **options
    )
    deadline = time.monotonic() + section.start_timeout_s
    patience_s = _FIRST_S
    while not group.wait(_whole_seconds(patience_s, deadline)):
        missing, lack = lacking(num_workers, bundle, labels)
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise NoRoomError(
                f"no room for {num_workers} workers within {section.start_timeout_s:g} s: {lack}. "
                "Ask for fewer shards or replicas, or add nodes"
            )
        say(f"waiting for {missing} of {num_workers} workers: {lack}")
        patience_s = _AGAIN_S
    return group


def _whole_seconds(patience_s: float, deadline: float) -> int:
    """Return how long to wait next; Ray takes whole seconds."""
    return max(1, math.ceil(min(patience_s, deadline - time.monotonic())))


def lacking(
    num_workers: int, bundle: Mapping[str, float], labels: Mapping[str, str]
) -> tuple[int, str]:
    """Return how many workers have no room, and a sentence that says why.

    Args:
        num_workers: number of workers.
        bundle: resource -> amount that each worker needs.
        labels: labels that the machine of a worker must have.
    """
    leaving = nodes_leaving()
    free = private.available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes: list[dict[str, Any]] = []
    num_fitting = 0
    num_placed = 0
    for node in _nodes():
        if not node["Alive"] or node["NodeID"] in leaving:
            continue
        nodes.append(node)
        if _has(node["Labels"], labels):
            num_fitting += 1
            num_placed += _num_bundles(free.get(node["NodeID"], {}), bundle)
    missing = max(1, num_workers - num_placed)
    wanted = " and ".join(f"{key}={value}" for key, value in labels.items())
    if labels and not num_fitting:
        lack = f"no node has {wanted}"
    else:
        amounts = " and ".join(f"{amount:g} {key}" for key, amount in bundle.items())
        node_text = "more node" if num_placed else "node"
        if labels:
            node_text += f" with {wanted}"
        lack = f"no {node_text} has {amounts} free"
    return missing, f"{lack}; the cluster has {_amounts_of(nodes, free, bundle)}"


def _num_bundles(free: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return how many bundles fit into the free resources of a machine."""
    return min(int(free.get(key, 0) // amount) for key, amount in bundle.items())


def _amounts_of(
    nodes: Sequence[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    keys: Iterable[str],
) -> str:
    """Return the number of machines and their free and total resources in words."""
    unit = "nodes" if len(nodes) > 1 else "node"
    totals: list[str] = []
    for key in keys:
        num_free = sum(free.get(node["NodeID"], {}).get(key, 0) for node in nodes)
        num_total = sum(node["Resources"].get(key, 0) for node in nodes)
        totals.append(f"{key} {num_free:g} free of {num_total:g}")
    return f"{len(nodes)} {unit}, {', '.join(totals)}"


def _has(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether the labels of a machine match a label selector of Ray: a, !a, in(a,b) or !in(a,b)."""
    for key, wanted in selector.items():
        is_negated = wanted.startswith("!")
        value = wanted.removeprefix("!")
        values = [value]
        if value.startswith("in("):
            values = [part.strip() for part in value[3:-1].split(",")]
        if (labels.get(key) in values) == is_negated:
            return False
    return True


def say_differences(of_workers: Sequence[Mapping[str, str]], say: Say) -> None:
    """Report each package that has another version on a worker than in this process."""
    for name, own in versions().items():
        others = {theirs[name] for theirs in of_workers} - {own}
        if others:
            say(
                f"note: the coordinator has {name} {own}, workers have "
                f"{', '.join(sorted(others))}; results may depend on who computes them. "
                "Use one image for all"
            )
