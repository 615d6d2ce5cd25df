"""Connection to Ray, its machines, and room on them."""

from __future__ import annotations

import logging
import os

import ray
import tenacity
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_surgeon.spec.cluster import RaySection

_TRIES = 4
"""Tries to connect by a Ray client.

Of the processes that serve clients, about one in twenty dies at its fork (Ray issue 63202).
"""


class NoRoomError(RuntimeError):
    """The cluster cannot hold the workers."""


def connect(address: str | None, num_cpus_needed: int) -> str:
    """Connect this process to Ray, starting one on this machine if none is named.

    Args:
        address: from the job spec. If it is None, ``RAY_ADDRESS`` is used.
        num_cpus_needed: logical CPUs of the local Ray, at least; more workers than cores take
            turns.

    Returns:
        What it is connected to, for the log.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: a local Ray cannot be started.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    if target:
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_lost_its_server),
            stop=tenacity.stop_after_attempt(_TRIES),
            reraise=True,
        )
        try:
            tries(ray.init, address=target, log_to_driver=False)
        except (ConnectionError, TimeoutError) as error:
            raise ValueError(
                f"cluster.address: cannot reach Ray at {target!r}: {error}; start it, check "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave the address out"
            ) from error
        return target
    num_cpus = max(os.cpu_count() or 1, num_cpus_needed)
    # its warning
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel("ERROR")
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except OSError as error:
        home = os.path.expanduser("~")
        raise RuntimeError(
            f"cannot start a local Ray: {error}; it needs a writable home ({home}) and temporary "
            "folder"
        ) from error
    return f"a local Ray with {num_cpus} CPUs"


def _lost_its_server(error: BaseException) -> bool:
    """Whether the cluster answers that it could not start what serves a client."""
    is_of_connection = isinstance(error, ConnectionError)
    return is_of_connection and "Initialization failure from server" in str(error)


def nodes_alive() -> set[str]:
    """Return the identities of the machines that are alive in the cluster."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return a strategy that places what is started on a machine, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return a strategy that places an actor beside this process.

    So it is not lost with a machine of workers.

    Not soft: Ray 2.60 takes a soft affinity of an actor without CPUs for none at times.
    """
    return on_node(ray.get_runtime_context().get_node_id())


def reserve(num_workers: int, section: RaySection) -> PlacementGroup:
    """Reserve room for all workers together, a bundle each.

    Raises:
        NoRoomError: there is none within the time; names what was asked for and what there is.
    """
    bundle: dict[str, float] = {"CPU": section.cpus_per_worker}
    if section.gpus_per_worker:
        bundle["GPU"] = section.gpus_per_worker
    group: PlacementGroup = placement_group([bundle] * num_workers, strategy="PACK")
    if not group.wait(section.start_timeout_s):
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        remove_placement_group(group)
        shown = ", ".join(
            f"{key} {free.get(key, 0):g} free of {total.get(key, 0):g}" for key in bundle
        )
        raise NoRoomError(
            f"no room for {num_workers} workers of {bundle} within {section.start_timeout_s:g} s; "
            f"the cluster has {shown}. Ask for fewer shards or replicas, or add nodes"
        )
    return group
