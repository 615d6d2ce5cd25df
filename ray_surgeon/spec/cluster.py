"""Workers and where they run: a union by `backend`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from ray_surgeon.spec.base import Positive, Section, by_tag, tag


class RetriesSection(Section):
    """How often a run continues from its last committed shot after a loss, by cause; 0 for never.

    Errors of the input are not retried.
    """

    worker: int = Field(3, ge=0)
    """A worker's process ended or stopped answering"""
    node: int = Field(10, ge=0)
    """A machine was lost, as spot machines are"""
    coordinator: int = Field(3, ge=0)
    """The coordinator's process ended or stopped answering"""
    communication: int = Field(3, ge=0)
    """A collective between replicas failed or took longer than step_timeout_s; on GPUs that counts
    as a lost worker
    """
    memory: int = Field(1, ge=0)
    """Ray ended a worker because its machine ran out of memory"""


class _Workers(Section):
    num_shards: Positive = 1
    """Pieces the blocks are cut into, one worker each"""
    num_replicas: Positive = 1
    """Copies of all shards; each sees its share of the sequences"""
    cpus_per_worker: Positive = 1
    """CPUs of a worker, which is also its number of torch threads"""
    gpus_per_worker: Literal[0, 1] = 0
    """1 puts every worker on a GPU of its own (backend local: all on one)"""

    @property
    def num_workers(self) -> int:
        """Workers in all."""
        return self.num_shards * self.num_replicas

    @property
    def device(self) -> str:
        """Where workers compute."""
        return "cuda" if self.gpus_per_worker else "cpu"


class LocalSection(_Workers):
    """All workers in this process, for debugging and notebooks; the results equal those on Ray."""

    backend: Literal["local"]
    """Workers in this process"""


class RaySection(_Workers):
    """Workers as Ray actors."""

    backend: Literal["ray"] = "ray"
    """Workers as Ray actors"""
    address: str | None = None
    """Ray address, e.g. auto, host:6379 or ray://host:10001; if not given, RAY_ADDRESS; if that is
    not set either, the job starts its own Ray
    """
    start_timeout_s: float = Field(300.0, gt=0)
    """How long to wait for the cluster to have room for all workers"""
    step_timeout_s: float = Field(1800.0, gt=0)
    """A collective between replicas that takes longer fails"""
    ping_timeout_s: float = Field(60.0, gt=0)
    """A process that does not answer for this long counts as lost"""
    retries: RetriesSection = RetriesSection()
    """How often a run continues after a loss, by cause"""


ClusterSection = Annotated[
    Annotated[RaySection, Tag(tag("ray"))] | Annotated[LocalSection, Tag(tag("local"))],
    by_tag(
        lambda get: get("backend", "ray") if get("backend", "ray") in ("ray", "local") else None,
        "backend ray or local",
    ),
]
