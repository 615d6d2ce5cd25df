"""The inputs of a plan (the job, the sizes of the model) and its result for each step."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.config.groups import DepthSection, ReconstructionSection
from ray_surgeon.config.pruning import PruningSection
from ray_surgeon.config.sections import (
    GenerationSection,
    QuantizeSection,
    RecoverySection,
)
from ray_surgeon.distributed.memory_plan.device_resources import Device
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.memory.stores import reserved_bytes
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.layout import LinearShape, ModelLayout


@dataclass(frozen=True)
class StepPlan:
    """One step on one worker."""

    name: str
    device: float  # peak bytes on the device
    host: float  # peak bytes in the host's memory beside it
    flops: float = 0.0  # of the products in the weights' dtype
    float32_flops: float = 0.0
    host_bytes: float = 0.0  # moved between host and device
    disk_bytes: float = 0.0  # moved between disk and host
    bubble: float = 1.0  # factor on the time because the shards wait for each other
    memory_bytes: float = 0.0  # read or written in the device's own memory
    sent_bytes: float = 0.0  # between workers
    waiting_s: float = 0.0  # until processes have started, or memory is pinned

    def seconds(self, device: Device, dtype: str) -> float:
        """Return a lower bound on the time of the step.

        It follows from operations and bytes alone. The host's time to launch kernels and to wait
        for their results comes in addition; small models and short sequences are bound by it.

        The times of products and of the device's memory are added, because most kernels are bound
        by one of them. So are those of moves: factors do not move while something computes, and an
        overlap of moving weights with computation is not counted on.

        Args:
            device: on which the step runs.
            dtype: of the weights.
        """
        computing = (
            self.flops / device.flops[dtype] + self.float32_flops / device.float32_flops
        )
        computing += self.memory_bytes / device.memory_bytes_per_s
        moving = self.host_bytes / device.host_bytes_per_s
        moving += self.disk_bytes / device.disk_bytes_per_s
        moving += self.sent_bytes / device.network_bytes_per_s
        return self.bubble * (computing + moving) + self.waiting_s

    def times(self, number: float) -> StepPlan:
        """Return that number of such steps, one after the other, as one step."""
        return replace(
            self,
            flops=number * self.flops,
            float32_flops=number * self.float32_flops,
            host_bytes=number * self.host_bytes,
            disk_bytes=number * self.disk_bytes,
            memory_bytes=number * self.memory_bytes,
            sent_bytes=number * self.sent_bytes,
            waiting_s=number * self.waiting_s,
        )

    def then(self, later: StepPlan) -> StepPlan:
        """Return this step and a later one as one step with this one's name."""
        flops = self.flops + later.flops
        if flops:  # each part waits its own time
            bubble = (self.flops * self.bubble + later.flops * later.bubble) / flops
        else:
            bubble = max(self.bubble, later.bubble)
        return StepPlan(
            name=self.name,
            device=max(self.device, later.device),
            host=max(self.host, later.host),
            flops=flops,
            float32_flops=self.float32_flops + later.float32_flops,
            host_bytes=self.host_bytes + later.host_bytes,
            disk_bytes=self.disk_bytes + later.disk_bytes,
            bubble=bubble,
            memory_bytes=self.memory_bytes + later.memory_bytes,
            sent_bytes=self.sent_bytes + later.sent_bytes,
            waiting_s=self.waiting_s + later.waiting_s,
        )


@dataclass(frozen=True)
class PlannedCurvature:
    """The passes over the calibration text that gather curvature."""

    section: AnyCurvature
    # changes of a block's output that are computed for a token; 0 mostly
    num_changes: int
    num_passes: int  # over the calibration text
    # copies of A and G as whole float32 matrices, beside the packed sums; 0 mostly
    num_copies: float


@dataclass(frozen=True)
class PlannedGroups:
    """Coupled groups, whose consumers are factorised and updated."""

    reach: float  # fraction of a consumer's columns of which copies may exist beside it
    share: float  # fraction of its groups that greedy paths are followed for


@dataclass(frozen=True)
class PlannedDepth:
    """The removal of whole layers."""

    section: DepthSection
    num_layers: int  # that may be removed
    num_removed: int  # in one shot
    tokens_per_input: int  # on which a linear is fitted, for each of its inputs


@dataclass(frozen=True)
class PlannedReconstruction:
    """The training of single layers in the update."""

    section: ReconstructionSection
    kinds: frozenset[str]  # of the groups whose layers are trained
    # sequences that pass backward in the curvature pass; None for all
    num_backward: int | None
    num_rates: int  # learning rates that are tried if the section has none
    trial_epochs: float  # passes over the calibration tokens with each of them


@dataclass(frozen=True)
class PlannedRecovery:
    """The training after the update of a shot."""

    section: RecoverySection
    num_steps: int  # of the training
    num_trial_steps: int  # with a learning rate that is tried
    steps_between_checks: int  # on the windows held aside
    steps_ahead: int  # whose sequences the dense model sees in one pass


@dataclass(frozen=True)
class PlannedExports:
    """The exports of all sizes of the model."""

    kinds: tuple[str, ...]  # of every export of every size
    num_processes: int  # fresh processes that read one export
    quantize: QuantizeSection | None  # how copies are quantised
    num_quantized: int  # copies
    num_backward: int  # sequences that pass backward for the rounding of both sides


@dataclass(frozen=True)
class PlannedTeacher:
    """A model that is loaded before the job's own, to be trained towards."""

    layout: ModelLayout = field(repr=False)
    placement: Placement  # of its blocks, on as many workers as the model's


@dataclass(frozen=True)
class PlannedJob:
    """The inputs of a plan beside model, placement and memory.

    A part that the job does not have is None or empty.
    """

    dtype: str  # of weights and activations
    num_sequences: int  # of the calibration
    sequence_length: int
    num_held: int = 0  # windows held aside
    # gathered by a pass over the calibration text
    factors: Literal["both", "A", "none"] = "none"
    # linears that are ranked, or updated by their factors
    gathered: frozenset[str] = frozenset()
    by_element: bool = False  # whether masks are of elements, or of rows and columns
    pruning: PruningSection | None = None
    groups: PlannedGroups | None = None
    depth: PlannedDepth | None = None
    # None for a method without curvature, costs and threshold
    curvature: PlannedCurvature | None = None
    reconstruction: PlannedReconstruction | None = None
    recovery: PlannedRecovery | None = None
    teacher: PlannedTeacher | None = None
    # number and tokens of the texts that the model writes for the calibration
    written_texts: tuple[tuple[int, int], ...] = ()
    answers: GenerationSection | None = None
    # number and length of the windows of each evaluation text, and of those held aside
    measured_texts: tuple[tuple[int, int], ...] = ()
    exports: PlannedExports | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model is beside the pruned one in the recovery."""
        return self.recovery is not None and self.recovery.section.has_teacher

    @property
    def trains_all(self) -> bool:
        """Whether the recovery needs all weights of the blocks on the device."""
        return self.recovery is not None and self.recovery.section.trains_all


_FORWARD_ENTRIES = 4.5
_BACKWARD_ENTRIES = 12.0
"""Entries read or written in a pass for each entry of an input or output of a linear; fits."""
_NORM_BYTES = 36.0
"""Bytes in addition for each entry of a norm that computes in float32 on another dtype; a fit."""


@dataclass(frozen=True)
class BlockTraffic:
    """Bytes that passes of some blocks read or write in the device's memory."""

    weight_bytes: float = 0.0  # in every call, forward or backward
    forward_token: float = 0.0  # for every token
    backward_token: float = 0.0

    def __add__(self, more: BlockTraffic) -> BlockTraffic:
        return BlockTraffic(
            weight_bytes=self.weight_bytes + more.weight_bytes,
            forward_token=self.forward_token + more.forward_token,
            backward_token=self.backward_token + more.backward_token,
        )


class ActivationBytes(NamedTuple):
    """Bytes that a block needs for a token.

    Fitted to measurements of Llama-2-7B's blocks in bfloat16 and SmolLM2's in float32.
    """

    kept: float  # from its forward to its backward pass
    moment: float  # in addition while it runs backward
    forward_only: float  # without gradients
    # of eager attention, by reading transformers' code: for each token that it sees, two kept and
    # four in a moment
    scores: float


class Shapes:
    """Sizes of a model's parts, each computed once.

    Attributes:
        layout: of the model.
        job: that is planned.
        width: bytes of a number.
        largest_tensor: bytes of the largest parameter.
        largest_stored: bytes of the largest tensor of a checkpoint, which may hold several.
        linears: of every block.
        block_bytes: of the weights of every block.
        factor_bytes: of the gathered packed factors of every block.
        active_parameters: parameters of every block's linears that a token is multiplied with.
        activations: of every block.
        traffic: function from a range of blocks to what their passes read and write.
        of_shard: function from a range of blocks to the bytes of a shard's weights outside of them,
            and those that a host reserves for the blocks' weights, and for their factors.
    """

    def __init__(
        self, layout: ModelLayout, job: PlannedJob, device_type: str = "cpu"
    ) -> None:
        """Compute the sizes.

        Args:
            layout: of the model.
            job: that is planned.
            device_type: of the workers, which determines how factors are laid out.
        """
        self.layout = layout
        self.job = job
        self.width: int = getattr(torch, job.dtype).itemsize
        self._sizes: dict[str, int] = {}
        for name, shape in layout.parameters.items():
            self._sizes[name] = self.width * math.prod(shape)
        self.largest_tensor = max(self._sizes.values())
        self.largest_stored = self._largest_stored()
        self.linears: list[list[LinearShape]] = [[] for _ in range(layout.num_blocks)]
        for linear in layout.linears:
            self.linears[linear.block].append(linear)
        self._in_blocks = self._sizes_in_blocks()
        self.block_bytes = [sum(sizes) for sizes in self._in_blocks]
        self._factors = [
            _factor_sizes(linears, job, device_type) for linears in self.linears
        ]
        self.factor_bytes = [sum(sizes) for sizes in self._factors]
        self.active_parameters = [
            self._active_parameters(linears) for linears in self.linears
        ]
        self.activations = [self._activation_bytes(linears) for linears in self.linears]
        self._traffic = self._traffic_of_blocks()
        self.traffic = functools.cache(self._sum_of_traffic)
        self.of_shard = functools.cache(self._of_shard)

    def _largest_stored(self) -> int:
        stored: dict[str, int] = defaultdict(int)
        for name, size in self._sizes.items():
            stored[self.layout.family.stored_in(name)] += size
        return max(stored.values())

    def _sizes_in_blocks(self) -> list[list[int]]:
        """Return the bytes of every parameter of each block."""
        sizes: list[list[int]] = [[] for _ in range(self.layout.num_blocks)]
        for name, size in self._sizes.items():
            block = self.layout.block_of(name)
            if block is not None:
                sizes[block].append(size)
        return sizes

    def _active_parameters(self, linears: Sequence[LinearShape]) -> float:
        return sum(linear.size * self.layout.part_of_tokens(linear) for linear in linears)

    def _activation_bytes(self, linears: list[LinearShape]) -> ActivationBytes:
        """Count outputs of a block's linears, products of the feed-forward layer, and copies.

        Attention copies its inputs, and norms keep theirs in float32.
        """
        layout = self.layout
        hidden = int(layout.config.hidden_size)
        outputs = sum(
            linear.num_rows * layout.part_of_tokens(linear) for linear in linears
        )
        widest = max(linear.num_columns for linear in linears)
        norms = 8 * hidden if self.width < 4 else 0
        has_scores = layout.family.runs_attention == "eager"
        return ActivationBytes(
            kept=self.width * (outputs + widest + 4 * hidden) + norms,
            moment=self.width * 4 * widest + 12 * hidden,
            forward_only=self.width * 3 * widest + 4 * hidden,
            scores=self.width * layout.heads.num_query if has_scores else 0,
        )

    def _traffic_of_blocks(self) -> list[BlockTraffic]:
        """Return the traffic of every block."""
        layout = self.layout
        norms: list[list[int]] = [[] for _ in range(layout.num_blocks)]
        for name, shape in layout.parameters.items():
            block = layout.block_of(name)
            if block is not None and len(shape) == 1 and name.endswith("weight"):
                norms[block].append(shape[0])
        traffic = []
        for block in range(layout.num_blocks):
            traffic.append(self._traffic_of(block, norms[block]))
        return traffic

    def _traffic_of(self, block: int, norms: Sequence[int]) -> BlockTraffic:
        """Return the traffic of a block, whose norms have these numbers of entries."""
        linears = self.linears[block]
        weight_bytes = self.block_bytes[block]
        width = weight_bytes / max(1, sum(linear.size for linear in linears))
        norm_bytes = 0.0
        if width < 3:  # norms convert their inputs
            norm_bytes = _NORM_BYTES * sum(norms)
        entries = 0.0
        for linear in linears:
            part = self.layout.part_of_tokens(linear)
            entries += part * (linear.num_rows + linear.num_columns)
        return BlockTraffic(
            weight_bytes=weight_bytes,
            forward_token=width * _FORWARD_ENTRIES * entries + norm_bytes,
            backward_token=width * _BACKWARD_ENTRIES * entries + norm_bytes,
        )

    def _sum_of_traffic(self, blocks: BlockRange) -> BlockTraffic:
        return sum(self._traffic[blocks.first : blocks.last], BlockTraffic())

    def _of_shard(self, blocks: BlockRange) -> tuple[int, int, int]:
        own = slice(blocks.first, blocks.last)
        outside = 0
        for name in self.layout.parameters_of(blocks):
            if self.layout.block_of(name) is None:
                outside += self._sizes[name]
        weights = reserved_bytes(itertools.chain(*self._in_blocks[own]))
        factors = reserved_bytes(itertools.chain(*self._factors[own]))
        return outside, weights, factors


def _factor_sizes(
    linears: list[LinearShape], job: PlannedJob, device_type: str
) -> list[int]:
    """Return the bytes of A and G of a block's linears, packed in float32."""
    if job.factors == "none":
        return []
    columns: dict[int, int] = {}  # shared input -> size of A
    rows = []
    for linear in linears:
        if linear.name in job.gathered:
            columns[linear.shared_input] = linear.num_columns
            rows.append(linear.num_rows)
    orders = [*columns.values(), *rows]
    return [4 * PackedSymmetric.size(order, device_type) for order in orders]
