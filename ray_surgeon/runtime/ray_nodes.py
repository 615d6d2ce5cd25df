"""The machines of a Ray cluster: which there are, which are taken away, and room on them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray._private.state as private
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ray_surgeon.runtime.cluster import NoRoomError
from ray_surgeon.runtime.usage import versions
from ray_surgeon.spec.sections import RaySection

Say = Callable[[str], None]
"""Takes a line for who watches the run."""
_FIRST_S = 8.0
_AGAIN_S = 60.0
"""After which a run that waits for room says for what, and says so again."""


def nodes_alive() -> set[str]:
    """Return the identities of the machines that are alive in the cluster."""
    return {node["NodeID"] for node in _nodes() if node["Alive"]}


def nodes_preempted() -> set[str]:
    """Return those that were lost after Ray had been told that they would be taken away."""
    taken = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    return {node["NodeID"] for node in _nodes() if node["DeathReason"] == taken}


def nodes_leaving() -> set[str]:
    """Return those that are alive and about to be taken away; Ray places nothing there any more."""
    return set(private.state.get_draining_nodes())  # as Ray Train asks; nothing public tells


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def reserve(num_workers: int, section: RaySection, say: Say) -> PlacementGroup:
    """Reserve room for all workers together, a bundle each.

    Args:
        num_workers: in all.
        section: what each of them gets, and how long to wait.
        say: is told what is waited for.

    Raises:
        NoRoomError: there is none within the time; names what was asked for and what there is.
    """
    amounts = {"CPU": section.cpus_per_worker, "GPU": section.gpus_per_worker}
    bundle: dict[str, float] = {key: amount for key, amount in amounts.items() if amount}
    labels = dict(section.worker_labels)
    options: dict[str, Any] = {"bundle_label_selector": [labels] * num_workers} if labels else {}
    group: PlacementGroup = placement_group([bundle] * num_workers, strategy="PACK", **options)
    deadline = time.monotonic() + section.start_timeout_s
    patience_s = _FIRST_S
    # in whole seconds, as Ray waits
    while not group.wait(max(1, math.ceil(min(patience_s, deadline - time.monotonic())))):
        missing, lack = lacking(num_workers, bundle, labels)
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            problem = f"no room for {num_workers} workers within {section.start_timeout_s:g} s"
            remedy = "Ask for fewer shards or replicas, or add nodes"
            raise NoRoomError(f"{problem}: {lack}. {remedy}")
        say(f"waiting for {missing} of {num_workers} workers: {lack}")
        patience_s = _AGAIN_S
    return group


def lacking(
    num_workers: int, bundle: Mapping[str, float], labels: Mapping[str, str]
) -> tuple[int, str]:
    """Return how many workers have no room, and what no machine has, for people.

    Args:
        num_workers: in all.
        bundle: resources of each of them.
        labels: that its machine must have.
    """
    leaving = nodes_leaving()
    free = private.available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = [node for node in _nodes() if node["Alive"] and node["NodeID"] not in leaving]
    fitting = [node["NodeID"] for node in nodes if _has(node["Labels"], labels)]
    num_placed = sum(
        min(int(free.get(node, {}).get(key, 0) // amount) for key, amount in bundle.items())
        for node in fitting
    )
    missing = max(1, num_workers - num_placed)
    wanted = " and ".join(f"{key}={value}" for key, value in labels.items())
    if labels and not fitting:
        lack = f"no node has {wanted}"
    else:
        amounts = " and ".join(f"{amount:g} {key}" for key, amount in bundle.items())
        more = "more " if num_placed else ""
        lack = f"no {more}node{wanted and ' with '}{wanted} has {amounts} free"
    totals = [
        f"{key} {sum(free.get(node['NodeID'], {}).get(key, 0) for node in nodes):g} free of "
        f"{sum(node['Resources'].get(key, 0) for node in nodes):g}"
        for key in bundle
    ]
    there = f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {', '.join(totals)}"
    return missing, f"{lack}; the cluster has {there}"


def _has(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a machine has what Ray's label selectors ask for: a, !a, in(a,b) or !in(a,b)."""
    for key, wanted in selector.items():
        value = wanted.removeprefix("!")
        is_list = value.startswith("in(")
        values = [part.strip() for part in value[3:-1].split(",")] if is_list else [value]
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True


def say_differences(of_workers: Sequence[Mapping[str, str]], say: Say) -> None:
    """Say which versions of workers are not those of this process, a line for each."""
    for name, own in versions().items():
        others = sorted({theirs[name] for theirs in of_workers} - {own})
        if others:
            problem = f"the coordinator has {name} {own}, workers have {', '.join(others)}"
            say(f"note: {problem}; results may depend on who computes them. Use one image for all")
