"""What travels between the coordinator and the workers: frozen, small, picklable. Never A, G or weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.sources import ModelSource
from ray_surgeon.surgery.element_surgery import ElementUnits, ElementUpdate


@dataclass(frozen=True, order=True)
class WorkerIndex:
    """Which worker: the shard it holds and the replica it belongs to, e.g. (shard=1, replica=0)."""

    shard: int
    replica: int


@dataclass(frozen=True)
class Lost:
    """What went away under a run that may go on from its last committed shot.

    Attributes:
        cause: "worker", "node", "coordinator", "communication" or "memory"; see `sections.RetriesSection`.
        message: one line.
    """

    cause: str
    message: str

    @staticmethod
    def by(cause: str, error: BaseException) -> Lost:
        """Return a loss with the beginning of an error, which may have many lines, as its message."""
        return Lost(cause, " ".join(str(error).split())[:300])


@dataclass(frozen=True)
class Wire:
    """A tensor on its way: a numpy array and the torch dtype it stands for, e.g. int16 for "bfloat16"."""

    array: NDArray[np.generic]
    dtype: str


@dataclass(frozen=True)
class SavedFile:
    """A file a worker wrote, e.g. ("shots/0001/shard-0001.safetensors", 123, ("model.layers.0...",))."""

    uri: str
    size_bytes: int
    keys: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class ModelRecipe:
    """How a worker gets its weights.

    Attributes:
        source: the dense model.
        dtype: of weights and activations, e.g. "float32".
        shot_files: of the committed shot that a run is resumed from; their tensors replace the dense ones.
    """

    source: ModelSource
    dtype: str
    shot_files: tuple[SavedFile, ...] = ()


@dataclass(frozen=True)
class CurvatureOptions:
    """Which curvature, and how it is damped; see `spec.CurvatureSection`."""

    kind: str
    damping_a: float
    damping_g: float
    max_damping: float


@dataclass(frozen=True)
class CostOptions:
    """Which costs are wanted; see `sections.PruningSection`.

    Attributes:
        greedy_limit: see `LinearSurgery.candidates`; None for costs of structures as if each went alone.
    """

    structure: str
    rank_by: str
    costs: str
    units: ElementUnits
    curvature: CurvatureOptions
    greedy_limit: float | None = None

    @property
    def by_element(self) -> bool:
        """Whether elements or N:M groups go, not whole rows and columns."""
        return self.structure in ("element", "n_m")


@dataclass(frozen=True)
class PruneOptions:
    """How the weights that stay are updated; see `spec.UpdatesSection`.

    Attributes:
        joint: of rows and columns; see `prune_rows_and_columns`.
        update: of elements; its `correlations` and `step` count for rows and columns too.
    """

    joint: str
    update: ElementUpdate


@dataclass(frozen=True)
class GroupOptions:
    """Which coupled groups may go.

    Attributes:
        kinds: of ``ffn`` and ``attention``.
        least: kind -> groups that stay in every block.
        multiples: kind -> the number of groups left must be a multiple of this, or all that the dense model has.
        uniform: whether plain model classes must be able to hold the numbers that are left.
        limit: how high the greedy curves are climbed; None for the cost of each group as if it went alone.
        sizes: kind -> what a group's cost is divided by before it is compared with `limit`.
        needed: kind -> groups of every block that may be needed whatever they cost.
    """

    kinds: tuple[str, ...]
    least: Mapping[str, int]
    multiples: Mapping[str, int]
    uniform: bool
    sizes: Mapping[str, float]
    limit: float | None = None
    needed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ReaderCosts:
    """Heights of the groups of one reader; `GroupCosts` with an array in place of a tensor, and the parameters of one group."""

    reader: str
    kind: str
    heights: NDArray[np.float32]
    num_left: int
    num_parameters: int
    allowed: frozenset[int]


@dataclass(frozen=True)
class GroupsReply:
    """Costs of the groups whose readers a worker owns; the rest as in `CostsReply`."""

    costs: tuple[ReaderCosts, ...]
    num_parameters: int
    num_kept: int
    damping: tuple[DampingEvent, ...]


@dataclass(frozen=True)
class LayerwiseOptions:
    """How SparseGPT and Wanda prune; see `sections.PruningSection`.

    Attributes:
        method: "sparsegpt" or "wanda".
        sparsity: fraction of each linear's parameters that is gone afterwards.
        units: elements or N:M groups.
        damping_a: relative damping of A, of SparseGPT.
        max_damping: see `factorise`.
    """

    method: str
    sparsity: float
    units: ElementUnits
    damping_a: float
    max_damping: float


@dataclass(frozen=True)
class LowRankOptions:
    """How low-rank corrections start; see `spec.CorrectionSection`."""

    rank: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class ClippingEvent:
    """A further Kronecker term that would have made the Fisher indefinite, e.g. ("...q_proj", 1, 0.12): changed by 12 %."""

    linear: str
    term: int
    change: float


@dataclass(frozen=True)
class DampingEvent:
    """A factorisation that needed more than was asked for, e.g. ("...q_proj", "A", asked 0.01, used 0.1, True)."""

    linear: str
    factor: str
    asked: float
    used: float
    float64_retry: bool


@dataclass(frozen=True)
class LinearCosts:
    """Costs of one linear's candidates; `StructureCosts` with arrays in place of tensors."""

    name: str
    num_parameters: int
    num_rows: int
    num_columns: int
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]


@dataclass(frozen=True)
class CostsReply:
    """Costs of the linears that a worker owns.

    Attributes:
        costs: of rows and columns; empty if elements go, whose costs never leave the worker.
        num_parameters: entries of the owned linears.
        num_kept: of them, what earlier shots kept.
        damping: factorisations that needed more damping than asked for.
        clipping: further Kronecker terms that were clipped.
    """

    costs: tuple[LinearCosts, ...]
    num_parameters: int
    num_kept: int
    damping: tuple[DampingEvent, ...]
    clipping: tuple[ClippingEvent, ...] = ()


@dataclass(frozen=True)
class LinearSummary:
    """What is left of one linear after a shot.

    Attributes:
        name: the linear.
        num_rows: rows in all.
        num_columns: columns in all, the bias included.
        rows_kept: rows of which something stays.
        columns_kept: columns of which something stays, the bias included.
        num_kept: entries that the mask keeps.
        num_nonzero: entries that are not exactly zero.
        predicted_loss_increase: the quadratic model's, for this shot's change of this linear, in nats per token; None if the method
            has none.
        residual: of the equations of the update, relative; 0 where they are solved directly.
    """

    name: str
    num_rows: int
    num_columns: int
    rows_kept: int
    columns_kept: int
    num_kept: int
    num_nonzero: int
    predicted_loss_increase: float | None
    residual: float


@dataclass(frozen=True)
class Usage:
    """What a worker's process has used since it started; workers of one process report the same process.

    Attributes:
        process: host and number.
        cpu_s: CPU time of all its threads.
        peak_rss_bytes: peak of its resident memory.
        peak_gpu_bytes: peak of what torch allocated on its GPU.
        busy_s: wall clock that this worker itself spent inside its methods.
    """

    process: str
    cpu_s: float
    peak_rss_bytes: int
    peak_gpu_bytes: int = 0
    busy_s: float = 0.0
