"""The description of a job that a plan is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.config.depth import DepthSection
from ray_surgeon.config.evaluation import GenerationSection
from ray_surgeon.config.pruning import PruningSection
from ray_surgeon.config.reconstruction import ReconstructionSection
from ray_surgeon.config.recovery import RecoverySection
from ray_surgeon.config.sections import QuantizeSection
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.models.layout import ModelLayout


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
    """Coupled groups, of which consumers are factorised and updated."""

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
